"""What a whole model computes when `transformers` runs it in one process: the truth for `potluck verify`.

Shares neither loading nor attention nor the reading of configurations with the torch engine. Of packed checkpoints
both are told by `cluster.models.matrices` which tensors make a matrix, and in how many bits; what the bits mean and
what mlx-lm calls things is written apart (`dequantised`, `unconverted`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar

from cluster.errors import ModelError
from cluster.models.checkpoint import open_checkpoint
from cluster.models.facts import ModelFacts
from cluster.models.families import family_of
from cluster.models.formats import MLX_MODES
from cluster.models.layout import Unused, part_of
from cluster.models.quantising import inputs_last, is_packed_at_load, is_turned
from node.comparison import Floats, Trace, drawn_tokens
from node.engines.torch.dequantised import dequantised
from node.engines.torch.quantising import rounded
from node.engines.torch.tensors import TORCH_DTYPES
from node.engines.torch.unconverted import is_converted, unconverted
from node.hardware import Device


def trace_whole_model(folder: Path, facts: ModelFacts, tokens: tuple[int, ...], device: Device) -> Trace:
    """Run the model in `folder` on `tokens`, without a cache."""
    model = _load(folder, facts)
    if facts.bits is not None:
        _round(model, facts.model_type, facts.bits)
    model = model.to(device.device)
    decoder = model.get_decoder()
    layers = list(getattr(decoder, "model", decoder).layers)  # Llama 4 takes the whole of itself for its decoder
    if len(layers) != facts.layer_count:
        raise ModelError(f"transformers built {len(layers)} layers of this model; its files hold {facts.layer_count}")
    hidden: list[Floats] = []

    def on_enter(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(_floats(args[0] if args else kwargs["hidden_states"]))

    def on_leave(_: object, __: object, output: Any) -> None:
        hidden.append(_floats(output if isinstance(output, torch.Tensor) else output[0]))

    layers[0].register_forward_pre_hook(on_enter, with_kwargs=True)
    inputs: list[Floats] = []

    def on_input(_: object, args: tuple[Any, ...]) -> None:
        inputs.append(_floats(args[1]))

    for layer in layers:
        layer.register_forward_hook(on_leave)
        if len(facts.boundary) > 1:
            layer.register_forward_pre_hook(on_input)
    entering = torch.tensor([tokens], device=device.device)
    with torch.inference_mode():
        output = model(input_ids=entering, use_cache=False, logits_to_keep=drawn_tokens(len(tokens)))
    own = np.concatenate(inputs).swapaxes(0, 1) if inputs else None
    return Trace(device, tokens, tuple(array[0] for array in hidden), _floats(output.logits)[0], own)


def _load(folder: Path, facts: ModelFacts) -> Any:
    disable_progress_bar()  # it would write between the command's own lines
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # Some vision-language models are known to the library as such alone.
        generative = type(config) in AutoModelForCausalLM._model_mapping
        auto: Any = AutoModelForCausalLM if generative else AutoModelForImageTextToText
        source: Any = folder
        named: dict[str, object] = {}
        checkpoint = open_checkpoint(folder)
        stated = facts.quantization if facts.bits is None else None
        in_words_of_mlx = is_converted(checkpoint) or (stated is not None and stated.kind in MLX_MODES)
        if stated is not None or in_words_of_mlx:
            auto = auto._model_mapping[type(config)]
            vars(config).pop("quantization_config", None)
            if not isinstance(config, auto.config_class):  # the class is of the text model alone
                config = config.get_text_config()
            numbers = dequantised(checkpoint, stated, TORCH_DTYPES[facts.dtype])
            if in_words_of_mlx:
                with torch.device("meta"):
                    own_names = auto(config).state_dict()
                numbers = unconverted(numbers, facts.model_type, own_names)
            source, named = None, {"config": config, "state_dict": numbers}
        model, report = auto.from_pretrained(
            source,
            **named,
            dtype=TORCH_DTYPES[facts.dtype],
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # outside input meets a library that raises whatever it runs into
        raise ModelError(f"transformers cannot load {folder}, so there is no reference: {error}") from error
    # What it does not find it fills with random numbers.
    missing = sorted(name for name in report["missing_keys"] if not isinstance(part_of(name), Unused))
    if missing:
        raise ModelError(f"transformers found no {', '.join(missing[:4])} in {folder} ({len(missing)} missing)")
    return model.eval()


def _floats(tensor: torch.Tensor) -> Floats:
    return np.array(tensor.float().cpu().numpy())


@torch.inference_mode()
def _round(model: torch.nn.Module, model_type: str, bits: int) -> None:
    """Leave of the weights what packing them at load leaves."""
    family, _ = family_of({"model_type": model_type}, "")
    for name, parameter in model.named_parameters():
        shape = inputs_last(name, tuple(parameter.shape), family)
        if not is_packed_at_load(name, shape, family):
            continue
        for matrix in parameter if parameter.ndim == 3 else (parameter,):
            turned = is_turned(name, family)
            less = rounded(matrix.T.contiguous() if turned else matrix, bits)
            matrix.copy_(less.T if turned else less)
