"""What does not fit, and what the torch engine would not compute exactly, is refused at load by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.errors import ModelError, UsageError
from node.engines.torch.tensors import device_from
from tests.oracle.pipelines import stage_specs
from tests.oracle.test_torch_load import change_tensors, copied, load

Checkpoints = Callable[[str], Path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.4.mlp.up_proj.weight"), "model.layers.4.mlp.up_proj.weight"),
        (lambda t: t.pop("model.layers.4.self_attn.q_norm.weight"), "model.layers.4.self_attn.q_norm.weight"),
        (lambda t: t.update({"model.layers.4.mlp.up_proj.weight": torch.zeros(64, 128)}), r"shape \(64, 128\)"),
        (lambda t: t.update({"model.layers.4.mlp.up_proj.weight": torch.zeros(128, 64).double()}), "stored as F64"),
        (lambda t: t.update({"model.layers.4.mlp.up_proj.bias": torch.zeros(128)}), "no place for"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    spec = stage_specs(checkpoint("qwen3"), (3,))[1]
    folder = copied(checkpoint("qwen3"), tmp_path)
    change_tensors(folder, change)
    with pytest.raises(ModelError, match=message):
        load(replace(spec, folder=folder))


def test_a_missing_expert_is_named(checkpoint: Checkpoints, tmp_path: Path) -> None:
    spec = stage_specs(checkpoint("qwen3_moe"), (3,))[1]
    folder = copied(checkpoint("qwen3_moe"), tmp_path)
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.4.mlp.experts.7.up_proj.weight"))
    with pytest.raises(ModelError, match=r"model.layers.4.mlp.experts.gate_up_proj' is missing some experts"):
        load(replace(spec, folder=folder))


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("llama", {"model_type": "mamba"}, "mamba"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes", "bits": 4}}, "which Potluck does not read"),
        ("llama", {"num_hidden_layers": 7}, "7"),
        ("llama", {"hidden_size": 72}, r"config.json says \[\(72,\)\]"),
        ("llama", {"hidden_size": "wide"}, "config.json is damaged"),
        ("llama", {"hidden_act": "selu5"}, "no model can be built"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 256,
                }
            },
            "longrope",
        ),
        ("qwen3", {"layer_types": ["chunked_attention"] * 6}, "chunked_attention"),
        ("gemma3", {"layer_types": ["sliding_attention"] * 5}, "layer"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("qwen3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_configurations_that_are_not_computed_are_refused_by_name(
    family: str, config: dict[str, object], message: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    spec = stage_specs(checkpoint(family), ())[0]
    with pytest.raises(ModelError, match=message):
        load(replace(spec, folder=copied(checkpoint(family), tmp_path, **config)))


def test_attention_that_asks_for_something_unknown_is_refused_at_load(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    forward = LlamaAttention.forward
    monkeypatch.setattr(
        LlamaAttention, "forward", lambda self, *args, **others: forward(self, *args, cu_seq_lens_q=1, **others)
    )
    with pytest.raises(ModelError, match="LlamaAttention asks its attention for cu_seq_lens_q"):
        load(stage_specs(checkpoint("llama"), ())[0])


def test_a_layer_that_keeps_its_state_elsewhere_is_refused_at_load(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    forward = LlamaAttention.forward

    def sometimes(self: LlamaAttention, hidden_states: torch.Tensor, **others: object) -> object:
        return (hidden_states, None) if self.layer_idx == 2 else forward(self, hidden_states, **others)

    monkeypatch.setattr(LlamaAttention, "forward", sometimes)
    with pytest.raises(ModelError, match=r"these did: \[0, 1, 3, 4, 5\]"):
        load(stage_specs(checkpoint("llama"), ())[0])


@pytest.mark.parametrize("device", ["cuda:99", "cpu:1", "tpu", "cuda:x", ""])
def test_a_device_that_does_not_exist_is_a_usage_error(device: str) -> None:
    with pytest.raises(UsageError):
        device_from(device)
