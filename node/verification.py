"""Whether stages compute what the whole model computes: each on the reference's own input, each layer alone, and all
of them chained through their own boundaries. On the way every layer is sketched, for comparison with other days.

Owns: feeding the stages and what is compared with what. Engines come from outside; what an error is and how large it
may be is `node.comparison`. Knows nothing of clusters, options or terminals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from cluster.models.facts import ModelFacts
from cluster.narrowing import narrow, widen
from cluster.steps import Boundary, Draw, Row, Sampling
from cluster.types import Backend, LayerRange, SequenceId
from node.comparison import Floats, Trace, errors_of, from_host, summary, to_host, tolerance
from node.engine import Engine, LoadProgress, Logits, StageSpec
from node.fingerprint import Sketch, sketch_of, steady_input, steady_rms
from node.verdict import Chain, Comparison, NarrowChain, Part, Verdict

Create = Callable[[Backend], Engine]

Tell = Callable[[str, int, int], None]
"""What is being done; how far it is, of how much."""

SEQUENCES = 2
"""Cached at once: one computes on the reference's input, one on what the stage before sent or on the steady input."""

_FED, _CHAINED, _STEADY, _NARROWED = SequenceId(1), SequenceId(2), SequenceId(2), SequenceId(1)
_GREEDY = Draw(Sampling(seed=0, temperature=0.0), prompt_tokens=0)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is verified: a model and how it is cut."""

    folder: Path
    facts: ModelFacts
    stages: tuple[Part, ...]
    narrow: bool = False  # see also what becomes of prompts whose activations travel in eight bits

    @property
    def routed(self) -> bool:
        """It has experts, of which a router chooses some for each token."""
        return any(layer.streamed_bytes < min(layer.resident_bytes.values()) for layer in self.facts.layers)

    @property
    def layers(self) -> tuple[Part, ...]:
        """Every layer alone (or the smallest group that can be cut out), where its stage computes it."""
        cuts = sorted(self.facts.legal_cuts | {0, self.facts.layer_count})
        return tuple(
            Part(stage.stage, LayerRange(first, last), stage.device)
            for first, last in pairwise(cuts)
            for stage in self.stages
            if first in stage.layers
        )


def verify(subject: Subject, trace: Trace, create: Create, tell: Tell) -> Verdict:
    """Compare every stage, the chain and every layer with `trace`. One engine is in memory at a time."""
    run = _Run(subject, trace, create, tell)
    stages: list[Comparison] = []
    carried: Sequence[Boundary | Logits | None] = run.nothing
    narrowed: Sequence[Boundary | Logits | None] = run.nothing
    for part in subject.stages:
        with run.engine(part) as engine:
            stages.append(run.compare(part, engine))
            carried = run.feed(engine, _CHAINED, carried)
            if subject.narrow:
                engine.drop(_FED)
                narrowed = run.feed(engine, _NARROWED, [_as_sent(leaving) for leaving in narrowed])
    chain = run.compare_chain(carried)
    layers: list[Comparison] = []
    sketches: list[Sketch] = []
    for part in subject.layers:
        with run.engine(part) as engine:
            layers.append(run.compare(part, engine))
            sketches.append(run.sketch(part, engine))
    narrow_chain = run.narrow_chain(narrowed) if subject.narrow else None
    return Verdict(tuple(stages), tuple(layers), chain, tuple(sketches), narrow_chain)


@dataclass(frozen=True, slots=True)
class _Run:
    subject: Subject
    trace: Trace
    create: Create
    tell: Tell

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """How the input arrives, as an answer's does: a prompt in two chunks, then token after token."""
        tokens = len(self.trace.tokens)
        drawn_from = tokens - len(self.trace.logits)
        return list(pairwise(sorted({0, drawn_from // 2, *range(drawn_from, tokens + 1)})))

    @property
    def nothing(self) -> list[None]:
        """What enters the first layer beside token ids."""
        return [None] * len(self.pieces)

    @contextmanager
    def engine(self, part: Part) -> Iterator[Engine]:
        facts, tokens = self.subject.facts, len(self.trace.tokens)
        spec = StageSpec(
            folder=self.subject.folder,
            layers=part.layers,
            layer_count=facts.layer_count,
            boundary=facts.boundary,
            device=part.device.device,
            threads=None,
            kv_tokens=SEQUENCES * tokens,
            context_tokens=tokens,
            bits=facts.bits,
        )

        what = f"layers {part.layers}" if len(part.layers) > 1 else f"layer {part.layers.first}"

        def on_progress(progress: LoadProgress) -> None:
            self.tell(f"{what} on {part.device.backend}", progress.done_bytes, progress.total_bytes)

        engine = self.create(part.device.backend)
        try:
            engine.load(spec, on_progress)
            yield engine
        finally:
            engine.close()

    def feed(
        self, engine: Engine, seq: SequenceId, entering: Sequence[Boundary | Logits | None]
    ) -> list[Boundary | Logits]:
        """Compute all pieces of the input; what leaves after each."""
        drawn_from = len(self.trace.tokens) - len(self.trace.logits)
        leaving = []
        for (begin, end), inputs in zip(self.pieces, entering, strict=True):
            assert not isinstance(inputs, np.ndarray), "no stage comes after the logits"
            row = Row(seq, begin, self.trace.tokens[begin:end], _GREEDY if begin >= drawn_from else None)
            leaving.append(engine.step([row], inputs))
        return leaving

    def computes_alike(self, part: Part) -> bool:
        """The same library on the same device. What torch keeps packed, transformers has unpacked and rounded."""
        packed = self.subject.facts.quantization is not None
        return part.device == self.trace.device and not (packed and part.device.backend is Backend.TORCH)

    def compare(self, part: Part, engine: Engine) -> Comparison:
        """Give the part what the reference had where it begins, and see what it makes of it."""
        layers, hidden, facts = part.layers, self.trace.hidden, self.subject.facts
        leaving = self.feed(
            engine, _FED, self.entering(hidden[layers.first], self.trace.inputs) if layers.first > 0 else self.nothing
        )
        if layers.last == facts.layer_count:
            error = self.logits_error(_logits(leaving))
        else:
            sent = [output for output in leaving if isinstance(output, tuple)]
            found = np.concatenate([from_host(output[0]) for output in sent])
            of_hidden = self.summary(errors_of(found, hidden[layers.last], hidden[layers.first : layers.last + 1]))
            error = float(np.maximum(of_hidden, self.inputs_error(sent)))  # NaN where either is
        same = self.computes_alike(part)
        return Comparison(part, error, self.tolerance(len(layers), same=same))

    def inputs_error(self, sent: Sequence[Boundary]) -> float:
        """Of what layers have for themselves: the first stage makes it for all of them, the others pass it on."""
        if self.trace.inputs is None:
            return 0.0
        found = np.concatenate([from_host(output[1]) for output in sent])
        return float(np.max(errors_of(found, self.trace.inputs, [self.trace.inputs])))

    def sketch(self, part: Part, engine: Engine) -> Sketch:
        """Give the part what it is given every time."""
        first, hidden = part.layers.first, self.trace.hidden[part.layers.first]
        tokens, width = hidden.shape
        rms = steady_rms(hidden) if first > 0 else 0.0
        steady: Sequence[Boundary | None] = self.nothing
        if first > 0:
            steady = self.entering(steady_input(first, tokens, width, rms), self.steady_inputs(tokens))
        return sketch_of(part.layers, rms, self.feed(engine, _STEADY, steady))

    def steady_inputs(self, tokens: int) -> Floats | None:
        """What layers have for themselves each time, as large as models make it."""
        if self.trace.inputs is None:
            return None
        layers, width = self.trace.inputs.shape[1:]
        return steady_input(layers, tokens, layers * width, 1.0).reshape(tokens, layers, width)

    def entering(self, hidden: Floats, inputs: Floats | None) -> list[Boundary]:
        """`hidden`, and the layers' own inputs where they have them, in pieces, as a stage takes them."""
        found = [hidden] if inputs is None else [hidden, inputs]
        specs = self.subject.facts.boundary
        return [
            tuple(to_host(array[begin:end], spec.dtype) for array, spec in zip(found, specs, strict=True))
            for begin, end in self.pieces
        ]

    def compare_chain(self, leaving: Sequence[Boundary | Logits | None]) -> Chain:
        logits = _logits(leaving)
        same = all(self.computes_alike(part) for part in self.subject.stages)
        return Chain(
            self.logits_error(logits),
            self.tolerance(self.subject.facts.layer_count, same=same),
            _likeliest(self.trace.logits),
            _likeliest(logits),
        )

    def narrow_chain(self, leaving: Sequence[Boundary | Logits | None]) -> NarrowChain:
        logits = _logits(leaving)
        return NarrowChain(self.logits_error(logits), _likeliest(self.trace.logits), _likeliest(logits))

    def logits_error(self, logits: Floats) -> float:
        return self.summary(errors_of(logits, self.trace.logits, [self.trace.logits]))

    def tolerance(self, layers: int, *, same: bool) -> float:
        return tolerance(self.subject.facts.dtype, layers, same=same, routed=self.subject.routed)

    def summary(self, errors: Floats) -> float:
        return summary(errors, self.subject.facts.dtype, routed=self.subject.routed)


def _as_sent(output: Boundary | Logits | None) -> Boundary | Logits | None:
    """As the next stage gets it: a prompt's piece in eight bits, and a single token as it is."""
    if not isinstance(output, tuple) or output[0].shape[0] == 1:
        return output
    return tuple(widen(narrow(tensor)) for tensor in output)


def _logits(leaving: Sequence[Boundary | Logits | None]) -> Floats:
    """What the last stage answered, of all pieces that draw."""
    return np.concatenate([output for output in leaving if isinstance(output, np.ndarray)])


def _likeliest(logits: Floats) -> tuple[int, ...]:
    return tuple(int(token) for token in logits.argmax(axis=-1))
