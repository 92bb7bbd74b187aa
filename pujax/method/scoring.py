"""The student's own scores of responses, with the anchor in view.

A scorer takes a `Scene`, what the student sees of one batch, and returns a score for each of the
G responses; higher is better. The abstract of arXiv 2601.20687 fixes *that* the student ranks its
candidates with the anchor in view; every score below is our instantiation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pujax.method.labels import standardize
from pujax.models.decoder import LanguageModel, Prefix
from pujax.models.logps import mean_logps, response_logps, token_logps
from pujax.types import Batch, Frames, Metrics, Params, Tokens


@dataclass
class Scene:
    """What the student sees of one batch while it scores. Lives while a function is traced.

    `logps` and `hidden` remember what they computed, so that scorers and reference log-probs
    share one pass over the responses. `notes` holds what a scorer adds to the step's metrics.
    `reader` may hold a budget, which these responses and their prompts fit.
    """

    reader: LanguageModel
    params: Params
    frames: Frames
    batch: Batch
    after: Tokens | Prefix
    tokens: Int[Array, "B G T"]
    mask: Bool[Array, "B G T"]
    key: Array
    wants_logps: bool = True
    notes: Metrics = field(default_factory=dict)
    _memory: dict[Any, Array] = field(default_factory=dict)

    @property
    def model(self) -> LanguageModel:
        """The model for prompts of a scorer's own making: no budget was made for those."""
        return self.reader.unpacked

    def logps(self, *, anchor: bool = True) -> Float[Array, "B G T"]:
        """Log-probs of the responses after their prompts; the anchors' may be left out, and 0."""
        if "logps" in self._memory:
            return self._memory["logps"]
        logps = response_logps(
            self.reader, self.params, self.after, self.tokens, self.mask, anchor=anchor
        )
        if anchor:
            self._memory["logps"] = logps
        return logps

    def hidden(self, layers: int) -> Float[Array, "B G T D"]:
        """The residual stream of the responses after `layers` layers, prompt in view.

        Where log-probs are wanted too, the pass that makes them drops this on its way.
        """
        if layers not in self._memory:
            if self.wants_logps and "logps" not in self._memory:
                states = self.reader.extend(
                    self.params, self.after, self.tokens, tap=layers, mask=self.mask
                )
                assert states.tapped is not None
                self._memory[layers] = states.tapped
                self._memory["logps"] = token_logps(
                    self.model,
                    self.params,
                    states.predicting[:, :, :-1],
                    self.tokens,
                    self.mask,
                )
            else:
                self._memory[layers] = self.model.read(
                    self.params, self.after, self.tokens, layers=layers
                )
        return self._memory[layers]

    def text_mask(self) -> Bool[Array, "B G T"]:
        """Response tokens without the EOS that ends them."""
        return self.mask & ~jnp.isin(self.tokens, jnp.array(self.model.config.eos_ids))

    def with_shuffled_anchors(self) -> "Scene":
        """The same candidates beside the anchor of the batch's next prompt: the control."""

        def rolled(values: Array) -> Array:
            return values.at[:, 0].set(jnp.roll(values[:, 0], 1, axis=0))

        return replace(
            self, tokens=rolled(self.tokens), mask=rolled(self.mask), wants_logps=False, _memory={}
        )


Scorer = Callable[[Scene], Float[Array, "B G"]]

# ---------------------------------------------------------------------- scores without a new prompt


def embedding(scene: Scene, *, depth: float = 2 / 3) -> Float[Array, "B G"]:
    """cos(h(y), h(a)): h averages the hidden state at `depth` of the layers over the response."""
    layers = max(1, round(depth * scene.model.config.layers))
    hidden = scene.hidden(layers).astype(jnp.float32)
    count = jnp.maximum(scene.mask.sum(axis=-1), 1)[..., None]
    mean = jnp.sum(hidden, axis=2, where=scene.mask[..., None]) / count
    unit = mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)
    return jnp.sum(unit * unit[:, :1], axis=-1)


def token_f1(scene: Scene) -> Float[Array, "B G"]:
    """F1 of the token multisets of response and anchor, EOS left out; 0 where either is empty."""
    mask = scene.text_mask()
    same = scene.tokens[..., :, None] == scene.tokens[..., None, :]
    earlier = jnp.tril(jnp.ones((scene.tokens.shape[-1],) * 2, bool), -1)[None, None]
    nth = jnp.sum(same & earlier, axis=-1, where=mask[..., None, :])
    in_anchor = scene.tokens[..., :, None] == scene.tokens[:, :1, None, :]
    available = jnp.sum(in_anchor, axis=-1, where=mask[:, :1, None, :])
    # The nth copy of a token is matched when the anchor holds more than n of it.
    shared = jnp.sum(available > nth, axis=-1, where=mask)
    return _f1(shared, mask)


def rouge(scene: Scene) -> Float[Array, "B G"]:
    """ROUGE-L F1 (Lin, 2004) on tokens: the longest common subsequence with the anchor."""
    mask = scene.text_mask()
    B, G, T = scene.tokens.shape
    anchor, anchor_mask = scene.tokens[:, :1], mask[:, :1]

    def row(above: Array, t: Array) -> tuple[Array, None]:
        """One response token against the whole anchor: a row of the usual table [B, G, T + 1]."""
        token = jax.lax.dynamic_index_in_dim(scene.tokens, t, axis=2)
        real = jax.lax.dynamic_index_in_dim(mask, t, axis=2)
        match = (token == anchor) & real & anchor_mask
        diagonal = above[..., :-1] + match
        best = jax.lax.cummax(jnp.maximum(above[..., 1:], diagonal), axis=2)
        return jnp.concatenate([above[..., :1], best], axis=-1), None

    table, _ = jax.lax.scan(row, jnp.zeros((B, G, T + 1), jnp.int32), jnp.arange(T))
    return _f1(table[..., -1], mask)


def _f1(shared: Int[Array, "B G"], mask: Bool[Array, "B G T"]) -> Float[Array, "B G"]:
    lengths = mask.sum(axis=-1)
    return 2.0 * shared / jnp.maximum(lengths + lengths[:, :1], 1)


def self_likelihood(scene: Scene) -> Float[Array, "B G"]:
    """mean-lp(y | x): `likelihood` with no anchor, the control that self-sharpening is."""
    return mean_logps(scene.logps(), scene.mask)


# ---------------------------------------------------------------------- scores that show the anchor


def likelihood(scene: Scene) -> Float[Array, "B G"]:
    """mean-lp(y | C(x, a)): C is a chat prompt that shows the anchor as the reference answer."""
    prompt = _join(
        scene.batch.references,
        _anchor_text(scene),
        _constant(scene.frames.reference_tail, scene.mask.shape[:1]),
    )
    logps = response_logps(scene.model, scene.params, prompt, scene.tokens, scene.mask)
    return mean_logps(logps, scene.mask)


def pmi(scene: Scene) -> Float[Array, "B G"]:
    """mean-lp(y | C(x, a)) − mean-lp(y | x): what seeing the anchor adds."""
    return likelihood(scene) - self_likelihood(scene)


def reconstruction(scene: Scene) -> Float[Array, "B G"]:
    """mean-lp(a | C(x, y)): how well the response, shown as reference, predicts the anchor.

    Every C(x, y) of a prompt starts alike, so that start is the shared prompt, and
    y + the rest of C + a is run as its response.
    """
    shown = _join(
        Tokens(scene.tokens, scene.text_mask().sum(axis=-1)),
        _constant(scene.frames.reference_tail, scene.mask.shape[:2]),
    )
    anchors = Tokens(
        jnp.broadcast_to(scene.tokens[:, :1], scene.tokens.shape),
        jnp.broadcast_to(scene.mask[:, :1].sum(axis=-1), shown.lengths.shape),
    )
    whole = _join(shown, anchors)
    mask = whole.mask & ~Tokens(whole.ids, shown.lengths).mask
    logps = response_logps(scene.model, scene.params, scene.batch.references, whole.ids, mask)
    return mean_logps(logps, mask)


def judge(scene: Scene) -> Float[Array, "B G"]:
    """Σ_r r·p(r), r = 1..5, from the next-token logits of a prompt that asks for a rating."""
    prompt = _join(
        scene.batch.references,
        _anchor_text(scene),
        _constant(scene.frames.judge_middle, scene.mask.shape[:1]),
    )
    shown = _join(
        Tokens(scene.tokens, scene.text_mask().sum(axis=-1)),
        _constant(scene.frames.judge_tail, scene.mask.shape[:2]),
    )
    hidden = scene.model.extend(scene.params, prompt, shown.ids).hidden
    last = jnp.take_along_axis(hidden, (shown.lengths - 1)[..., None, None], axis=2)[:, :, 0]
    logits = scene.model.unembed(scene.params, last)[..., jnp.asarray(scene.frames.rating_ids)]
    ratings = jnp.arange(1, 1 + logits.shape[-1], dtype=jnp.float32)[None, None]
    return jnp.sum(jax.nn.softmax(logits, axis=-1) * ratings, axis=-1)


# ---------------------------------------------------------------------- combinations and controls


def blend(
    scene: Scene, *, scores: Sequence[Scorer], weights: Sequence[float]
) -> Float[Array, "B G"]:
    """Weighted sum of `scores`, each standardised over its group's candidates first.

    That sum's mean is 0 in every group, so what it is made of is noted: the candidates' mean of
    each score as `score/<name>`, and as `score/mean` the weighted sum of those.
    """
    if len(scores) != len(weights):
        raise ValueError(f"blend: {len(scores)} scores but {len(weights)} weights: give one each")
    candidates = jnp.ones(scene.mask.shape[:2], bool).at[:, 0].set(False)
    total = mean = jnp.zeros(())
    for score, weight in zip(scores, weights, strict=True):
        raw = score(scene)
        noted = raw[:, 1:].mean()
        scene.notes[f"score/{getattr(score, 'func', score).__name__}"] = noted
        mean += weight * noted
        total += weight * standardize(raw, candidates)
    scene.notes["score/mean"] = mean
    return total


def shuffled(scene: Scene, *, score: Scorer) -> Float[Array, "B G"]:
    """`score` with another prompt's anchor in view: what of it does not come from the anchor."""
    return score(scene.with_shuffled_anchors())


def random(scene: Scene) -> Float[Array, "B G"]:
    """Uniform noise: the control that carries nothing."""
    return jax.random.uniform(scene.key, scene.mask.shape[:2])


def length(scene: Scene) -> Float[Array, "B G"]:
    """The number of tokens: the control that a score must not reduce to."""
    return scene.mask.sum(axis=-1).astype(jnp.float32)


# ---------------------------------------------------------------------- putting tokens together


def _join(*parts: Tokens) -> Tokens:
    """Parts as one, each starting where the last one's real tokens end."""
    whole = parts[0]
    for more in parts[1:]:
        ids, length = whole.ids, whole.lengths
        size = ids.shape[-1] + more.ids.shape[-1]
        at = jnp.arange(size).reshape((1,) * (ids.ndim - 1) + (size,))
        at = jnp.broadcast_to(at, (*ids.shape[:-1], size))
        first = jnp.take_along_axis(ids, jnp.minimum(at, ids.shape[-1] - 1), axis=-1)
        offset = jnp.clip(at - length[..., None], 0, more.ids.shape[-1] - 1)
        second = jnp.take_along_axis(more.ids, offset, axis=-1)
        ids = jnp.where(at < length[..., None], first, second)
        whole = Tokens(ids, length + more.lengths)
    return whole


def _anchor_text(scene: Scene) -> Tokens:
    """The anchors without the EOS that ends them."""
    return Tokens(scene.tokens[:, 0], scene.text_mask()[:, 0].sum(axis=-1))


def _constant(ids: Int[np.ndarray, " N"], shape: tuple[int, ...]) -> Tokens:
    """The same tokens for each of `shape` prompts or responses."""
    row = jnp.asarray(ids, jnp.int32).reshape((1,) * len(shape) + (len(ids),))
    return Tokens(jnp.broadcast_to(row, (*shape, len(ids))), jnp.full(shape, len(ids), jnp.int32))
