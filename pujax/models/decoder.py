"""One Flax module that works on groups: prompts once, their responses side by side.

`extend` runs prompts, each once, and the G responses of each through the layers together.
`prefill` encodes prompts alone into a `Prefix`, after which `extend` runs responses alone and
`decode` makes them token by token with a cache of the response alone. All of them run the same
layer functions, so the sampler, the scorers and the gradient agree.

Prompts are right-padded and carry a length; a response starts at position `length` of its prompt.
Layers are stacked on a leading axis L and scanned.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from pujax.models.attention import KEPT, Shared, attend, attend_next
from pujax.models.packing import Grid, TokenBudget, places, through_last
from pujax.models.parameters import (
    KERNELS,
    TENSOR,
    DecoderConfig,
    first_value,
    param_shapes,
)
from pujax.models.products import rounded, streamed, times
from pujax.models.rotary import for_layer, rotate, rotations
from pujax.models.sharding import gathered, split_rows
from pujax.models.tiles import on_cpu
from pujax.types import Params, Tokens

ATTENTION_IN, MLP_IN = ("q", "k", "v"), ("gate", "up")
"""The kernels of a layer that multiply the same input."""


@flax.struct.dataclass
class Prefix:
    """Prompts as the responses see them: keys and values of every layer, and the last hidden state.

    `last` is the normed final hidden state at each prompt's last token: it predicts the first
    token of every response.
    """

    k: Float[Array, "L B KV P H"]
    v: Float[Array, "L B KV P H"]
    lengths: Int[Array, " B"]
    last: Float[Array, "B D"]


@flax.struct.dataclass
class States:
    """Normed final hidden states at each prompt's last token and at the responses' tokens.

    `tapped` is the residual stream on the way there, where that was asked for.
    """

    last: Float[Array, "B D"]
    hidden: Float[Array, "B G T D"]
    tapped: Float[Array, "B G T D"] | None

    @property
    def predicting(self) -> Float[Array, "B G T+1 D"]:
        """The states that predict token 0, 1, ... T of each response."""
        B, G, _, D = self.hidden.shape
        first = jnp.broadcast_to(self.last[:, None, None], (B, G, 1, D))
        return jnp.concatenate([first, self.hidden], axis=2)


@flax.struct.dataclass
class Decoding:
    """What every step of a decoding loop reads: made once before it, layer by layer.

    Kernels are [out, in] under `<name>_rows`, in the dtype they multiply in, off a CPU those that
    read the same in one, as `q+k+v_rows`; keys have their tokens last, as `attend_next` wants them.
    """

    layers: tuple[Params, ...]
    k: tuple[Float[Array, "B KV H P"], ...]
    v: tuple[Float[Array, "B KV P H"], ...]
    lengths: Int[Array, " B"]


@flax.struct.dataclass
class Cache:
    """Keys and values of the K responses alone, a layer each; the prefix is never copied in."""

    k: tuple[Float[Array, "B KV K H T"], ...]
    v: tuple[Float[Array, "B KV K T H"], ...]


class LanguageModel(nn.Module):
    """A decoder-only transformer; its methods are pure functions of the parameters.

    As of any Flax module, `init` makes parameters and `apply` runs the plain forward. All else
    takes a tree of them, which may hold an adapter's entries beside the kernels (see `lora`).
    With a `budget` it leaves padding out, and must be given batches that fit: see `packed`. With a
    `mesh`, of several devices, each works on its share of the prompts: see `sharding.split_rows`.
    Hashable, so a jitted function may close over it or take it as a static argument.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    budget: TokenBudget | None = None
    mesh: Mesh | None = None

    def __hash__(self) -> int:
        return hash((self.config, self.dtype, self.remat, self.budget, self.mesh))

    @nn.compact
    def __call__(self, tokens: Int[Array, "B P"]) -> Float[Array, "B P V"]:
        """Logits of whole sequences."""
        if self.is_initializing():
            for name in param_shapes(self.config):
                self.param(name, partial(first_value, self.config, name))
        return self.forward(self.variables["params"], tokens)

    def init_params(self, key: Array) -> Params:
        """Random float32 parameters."""
        return self.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    def forward(self, params: Params, tokens: Int[Array, "B P"]) -> Float[Array, "B P V"]:
        """Logits of whole sequences: the plain forward, which tests hold the others against."""
        prompts = Tokens(tokens, jnp.full(tokens.shape[:1], tokens.shape[1]))
        stream, _, _ = self._run(params, prompts, _no_responses(prompts))
        return self.unembed(params, self._norm(stream, params["final_norm"]))

    @property
    def between(self) -> Any:
        """The type of what lies between products, as of the residual stream: see `products`."""
        return jnp.dtype(jnp.float32 if on_cpu() and self.mesh is None else self.dtype)

    @property
    def unpacked(self) -> "LanguageModel":
        """The same model without a budget: it computes padding too, so it takes any batch."""
        return self if self.budget is None else self.clone(budget=None)

    def prefill(self, params: Params, prompts: Tokens) -> Prefix:
        """Encode prompts once. With a budget, into which they must fit, padding is not computed."""
        budget = None if self.budget is None else self.budget.prompts
        stream, _, kv = self._run(params, prompts, _no_responses(prompts), budget=budget)
        assert kv is not None
        return Prefix(
            *kv, lengths=prompts.lengths, last=self._last(params, stream, prompts.lengths)
        )

    def extend(
        self,
        params: Params,
        after: Tokens | Prefix,
        tokens: Int[Array, "B G T"],
        *,
        tap: int | None = None,
        mask: Bool[Array, "B G T"] | None = None,
    ) -> States:
        """Final hidden states of responses, and the residual stream after `tap` layers.

        Position t sees the whole prompt and its own response's tokens up to t. Padding sits to
        the right of a response, so it changes nothing before it. With `mask` and a budget, into
        which the tokens up to the last that it marks and the prompts' must fit, padding is not
        computed, and its states are 0.
        """
        fresh = isinstance(after, Tokens)
        budget = None
        if self.budget is not None and mask is not None:
            budget = self.budget.at_once if fresh else self.budget.responses
        stream, tapped, _ = self._run(params, after, tokens, mask=mask, budget=budget, tap=tap)
        return States(
            last=self._last(params, stream, after.lengths) if fresh else after.last,
            hidden=self._norm(_responses(stream, tokens), params["final_norm"]),
            tapped=None if tapped is None else _responses(tapped, tokens),
        )

    def read(
        self, params: Params, after: Tokens | Prefix, tokens: Int[Array, "B G T"], *, layers: int
    ) -> Float[Array, "B G T D"]:
        """The residual stream of responses after `layers` layers; the later layers never run."""
        return _responses(self._run(params, after, tokens, layers=layers)[0], tokens)

    def ready_to_decode(self, params: Params) -> Params:
        """The parameters with the tables that every token reads made ready, once.

        On a mesh they are gathered; where products alone are of a narrow type, rounded to it.
        """
        tables = {}
        if self.mesh is not None:
            tables = {
                name: gathered(self.mesh, name, params[name].astype(self.dtype))
                for name in ("embed", "unembed")
                if name in params
            }
        elif self.between != self.dtype:
            tables = {"unembed_rows": self._factor(self.unembedding(params))}
        return params | tables

    def decoding(self, params: Params, prefix: Prefix) -> Decoding:
        """What `decode` needs of the layers and of the prompts.

        A token's few rows leave a kernel no time to be sliced from its stack or packed into tiles:
        on a CPU each costs as much as the product. So they are laid out here, once a loop. An
        accelerator spends most of a token on starting kernels, so there it gets fewer and larger
        ones; but not where heads are split, as a joined kernel's shares would cut across them.
        """
        layers = params["layers"]
        whole = self.mesh is None or self.mesh.shape[TENSOR] == 1
        joined = () if on_cpu() or not whole else (ATTENTION_IN, MLP_IN)

        def layer(i: int) -> Params:
            rest = {name: stack[i] for name, stack in layers.items() if name not in KERNELS}
            kernels = {name: rows(name, layers[name][i]) for name in layers if name in KERNELS}
            for names in joined:
                kernels["+".join(names)] = jnp.concatenate([kernels.pop(name) for name in names])
            return rest | {f"{name}_rows": kernel for name, kernel in kernels.items()}

        def rows(name: str, kernel: Array) -> Array:
            # On a mesh it is gathered here, once a loop and not once a token.
            return gathered(self.mesh, name, self._factor(kernel)).T

        count = range(self.config.layers)
        return Decoding(
            layers=tuple(layer(i) for i in count),
            k=tuple(prefix.k[i].swapaxes(-1, -2) for i in count),
            v=tuple(prefix.v[i] for i in count),
            lengths=prefix.lengths,
        )

    def decode(
        self,
        params: Params,
        decoding: Decoding,
        cache: Cache,
        tokens: Int[Array, "B K"],
        t: Int[Array, ""],
    ) -> tuple[Float[Array, "B K D"], Cache]:
        """Normed hidden state of every response's token `t`, and the cache with it added."""
        config = self.config
        x_BK1 = split_rows(self.mesh, self._embedded(params, tokens)[:, :, None])
        at_B11 = (decoding.lengths + t)[:, None, None]
        # Without the barrier every layer works the cosines and sines out anew.
        rope = jax.lax.optimization_barrier(rotations(config, at_B11))
        keys, values = list(cache.k), list(cache.v)
        for i, local in enumerate(config.local_layers):
            weights = decoding.layers[i]
            q_BK1, k_BK1, v_BK1 = self._qkv(weights, x_BK1, rope, local)
            # In place: the cache is carried. It has heads before candidates, and a key's width
            # before its token.
            k_at_t, v_at_t = _heads_first(k_BK1).swapaxes(-1, -2), _heads_first(v_BK1)
            keys[i] = jax.lax.dynamic_update_slice_in_dim(keys[i], k_at_t, t, axis=4)
            values[i] = jax.lax.dynamic_update_slice_in_dim(values[i], v_at_t, t, axis=3)
            mixed_BK = attend_next(
                q_BK1[:, :, 0],
                keys[i],
                values[i],
                t,
                shared_k=decoding.k[i],
                shared_v=decoding.v[i],
                lengths=decoding.lengths,
                reach=config.window if local else None,
            )
            x_BK1 = split_rows(self.mesh, self._finish(weights, x_BK1, mixed_BK[:, :, None]))
        hidden_BK = self._norm(x_BK1[:, :, 0], params["final_norm"])
        return hidden_BK, Cache(k=tuple(keys), v=tuple(values))

    def unembed(self, params: Params, hidden: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Float32 logits of a few normed hidden states; `unembed.chosen_logps` is for many."""
        table = params.get("unembed_rows")
        if table is None:
            table = self._factor(self.unembedding(params))
        return streamed(self._factor(hidden), table, jnp.float32)

    def unembedding(self, params: Params) -> Float[Array, "V D"]:
        """The table whose rows `unembed` multiplies hidden states with."""
        return params["embed" if self.config.tied else "unembed"]

    def empty_cache(self, prompts: int, candidates: int, size: int) -> Cache:
        """Room for `size` tokens of each of `candidates` responses to each prompt."""
        config, lead = self.config, (prompts, self.config.kv_heads, candidates)
        k = split_rows(self.mesh, jnp.zeros((*lead, config.head_width, size), self.between))
        v = split_rows(self.mesh, jnp.zeros((*lead, size, config.head_width), self.between))
        return Cache(k=(k,) * config.layers, v=(v,) * config.layers)

    # ------------------------------------------------------------------ the layers

    @property
    def _query_scale(self) -> float:
        config = self.config
        return config.query_scale if config.query_scale is not None else config.head_width**-0.5

    @property
    def _local(self) -> Bool[Array, " L"] | None:
        """One flag a layer, or None where every layer is global and nothing needs choosing."""
        flags = self.config.local_layers
        return jnp.array(flags) if any(flags) else None

    def _reach(self, local: Bool[Array, ""] | None) -> Int[Array, ""] | None:
        """How many tokens back, itself included, a token of this layer sees; None is no limit."""
        if local is None:
            return None
        return jnp.where(local, self.config.window, jnp.iinfo(jnp.int32).max)

    def _factor(self, x: Float[Array, "*N I"]) -> Float[Array, "*N I"]:
        """What a product of few rows multiplies: as wide as all else, with values of `dtype`."""
        return rounded(x, self.dtype) if self.between != self.dtype else x.astype(self.dtype)

    def _embedded(self, params: Params, tokens: Int[Array, "*N"]) -> Float[Array, "*N D"]:
        table = params["embed"]
        if self.mesh is not None and self.mesh.shape[TENSOR] > 1:
            # Split both ways, a looked-up row would be on the wrong devices twice over.
            table = gathered(self.mesh, "embed", table)
        x = table.at[tokens].get(mode="clip").astype(self.between)
        if "soft_prompt" in params:
            at_ND = tokens - self.config.vocab
            soft_ND = params["soft_prompt"].at[at_ND].get(mode="clip").astype(self.between)
            x = jnp.where(at_ND[..., None] < 0, x, soft_ND)
        scale = self.config.embed_scale
        return x if scale == 1.0 else x * jnp.asarray(scale, self.between)

    def _last(
        self, params: Params, stream: Float[Array, "B S D"], lengths: Int[Array, " B"]
    ) -> Float[Array, "B D"]:
        """The normed state at each prompt's last token, of rows that start with the prompts."""
        last = jnp.take_along_axis(stream, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self._norm(last, params["final_norm"])

    def _norm(self, x: Array, scale: Array) -> Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(
            jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.config.norm_eps
        )
        scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + scale.shape)
        return (normed * scale).astype(self.between)

    def _project(self, weights: Params, name: str, x: Float[Array, "*N I"]) -> Float[Array, "*N O"]:
        """Through the named kernel, with its bias and its low-rank adapter where it has them."""
        if f"{name}_rows" in weights:
            y = streamed(self._factor(x), weights[f"{name}_rows"], self.between)
        else:
            (y,) = times(x, (weights[name],), self.dtype)
        return self._completed(weights, name, x, y)

    def _completed(self, weights: Params, name: str, x: Array, y: Array) -> Array:
        """The product `y` of `x` and a kernel, with the adapter's part and the bias added."""
        if f"{name}_lora_a" in weights:
            (low,) = times(x, (weights[f"{name}_lora_a"],), self.dtype)
            (change,) = times(low, (weights[f"{name}_lora_b"],), self.dtype)
            y = y + change * self.config.lora_scale
        if f"{name}_bias" in weights:
            bias = weights[f"{name}_bias"].astype(self.between)
            y = y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)
        return y

    def _reading(
        self, weights: Params, names: tuple[str, ...], x: Float[Array, "*N I"]
    ) -> Callable[[str], Array]:
        """What takes `x` through a named one of the kernels that read it.

        The products are made here: one where `decoding` joined the kernels, else one each. Where
        it laid them out one by one each is made as it is called.
        """
        joined = weights.get("+".join(names) + "_rows")
        if joined is not None:
            shapes = param_shapes(self.config)["layers"]
            ends = list(accumulate(shapes[name][-1] for name in names))[:-1]
            products = jnp.split(streamed(self._factor(x), joined, self.between), ends, axis=-1)
        elif names[0] in weights:
            products = times(x, tuple(weights[name] for name in names), self.dtype)
        else:
            return lambda name: self._project(weights, name, x)
        made = dict(zip(names, products, strict=True))
        return lambda name: self._completed(weights, name, x, made[name])

    def _qkv(
        self,
        weights: Params,
        x: Float[Array, "*N D"],
        rope: dict[bool, Array],
        local: Array | bool | None,
    ) -> tuple[Float[Array, "*N KV R H"], Float[Array, "*N KV H"], Float[Array, "*N KV H"]]:
        """Rotated, scaled queries, and keys and values."""
        config, lead = self.config, x.shape[:-1]
        through = self._reading(weights, ATTENTION_IN, self._norm(x, weights["attn_norm"]))

        def by_head(name: str, heads: int) -> Float[Array, "*N X H"]:
            return through(name).reshape(*lead, heads, config.head_width)

        q, k, v = by_head("q", config.heads), *(by_head(n, config.kv_heads) for n in ("k", "v"))
        if config.qk_norm:
            q = self._norm(q, weights["q_norm"])
            k = self._norm(k, weights["k_norm"])
        angles = for_layer(rope, local)
        q, k = rotate(q, angles), rotate(k, angles)
        q = q * jnp.asarray(self._query_scale, q.dtype)
        return q.reshape(*lead, config.kv_heads, -1, config.head_width), k, v

    def _finish(
        self, weights: Params, x: Float[Array, "*N D"], mixed: Float[Array, "*N O"]
    ) -> Float[Array, "*N D"]:
        """The rest of a layer: output projection, residuals and the gated MLP."""
        config = self.config
        y_ND = self._project(weights, "o", mixed)
        if config.post_norms:
            y_ND = self._norm(y_ND, weights["post_attn_norm"])
        x_ND = x + y_ND
        through = self._reading(weights, MLP_IN, self._norm(x_ND, weights["mlp_norm"]))
        gate_NF = through("gate")
        gate_NF = jax.nn.gelu(gate_NF, approximate=True) if config.gelu else jax.nn.silu(gate_NF)
        y_ND = self._project(weights, "down", gate_NF * through("up"))
        if config.post_norms:
            y_ND = self._norm(y_ND, weights["post_mlp_norm"])
        return x_ND + y_ND

    def _run(
        self,
        params: Params,
        after: Tokens | Prefix,
        responses: Int[Array, "B G T"],
        *,
        mask: Bool[Array, "B G T"] | None = None,
        budget: int | None = None,
        layers: int | None = None,
        tap: int | None = None,
    ) -> tuple[Array, Array | None, tuple[Array, Array] | None]:
        """Tokens through the layers: prompts that are not encoded yet, responses, or both.

        A prompt and its responses are one row of P + G·T tokens (P is 0 where a `Prefix` has the
        prompt), so each kernel multiplies them all at once and gets its gradient from one product.
        Returns the residual stream [B, P + G·T, D], the same after `tap` layers, and the keys and
        values [L, B, KV, P, H] of prompts that came without responses.
        """
        config = self.config
        (B, G, T), lengths = responses.shape, after.lengths
        encoded = (after.k, after.v) if isinstance(after, Prefix) else None
        prompts_BP = after.ids if isinstance(after, Tokens) else jnp.zeros((B, 0), jnp.int32)
        P = prompts_BP.shape[1]
        at_BP = jnp.broadcast_to(jnp.arange(P)[None], (B, P))
        at_BGT = jnp.broadcast_to(lengths[:, None, None] + jnp.arange(T)[None, None], (B, G, T))

        def row(of_prompt_BP: Array, of_responses_BGT: Array) -> Array:
            return jnp.concatenate([of_prompt_BP, of_responses_BGT.reshape(B, G * T)], axis=1)

        pack = None
        if budget is not None:
            assert self.budget is not None
            real_BGT = jnp.ones((B, G, T), bool) if mask is None else through_last(mask)
            pack = places(row(at_BP < lengths[:, None], real_BGT), budget, self.budget.ways)
        # S is P + G·T. Between `taken` and `spread` a token may stand in a pack instead of its row.
        grid = Grid((B, P + G * T), pack)
        x = grid.taken(split_rows(self.mesh, self._embedded(params, row(prompts_BP, responses))))
        rope = grid.taken_angles(rotations(config, row(at_BP, at_BGT)))

        def layer(carry, inputs):
            x, tapped, i = carry
            weights, local, prompt_kv = inputs
            q_BS, k_BS, v_BS = map(grid.spread, self._qkv(weights, x, rope, local))
            attended, reach = [], self._reach(local)
            if P:
                of_prompt = (y_BS[:, None, :P] for y_BS in (q_BS, k_BS, v_BS))
                attended.append(attend(*of_prompt, reach=reach)[:, 0])
                k_prompt, v_prompt = (y_BS[:, :P].transpose(0, 2, 1, 3) for y_BS in (k_BS, v_BS))
                prompt_kv = k_prompt, v_prompt
            if G:
                of_responses = (
                    y_BS[:, P:].reshape(B, G, T, *y_BS.shape[2:]) for y_BS in (q_BS, k_BS, v_BS)
                )
                mixed_BGT = attend(
                    *of_responses, shared=Shared(prompt_kv[0], prompt_kv[1], lengths), reach=reach
                )
                attended.append(mixed_BGT.reshape(B, G * T, -1))
            x = self._finish(weights, x, grid.taken(jnp.concatenate(attended, axis=1)))
            x = split_rows(self.mesh, x)
            if tapped is not None:
                tapped = jnp.where(i + 1 == tap, x, tapped)
            return (x, tapped, i + 1), None if G else prompt_kv

        stacks = (params["layers"], self._local, encoded)
        if layers is not None:
            stacks = jax.tree.map(lambda stack: stack[:layers], stacks)
        start = (x, None if tap is None else jnp.zeros_like(x), jnp.int32(0))
        (x, tapped, _), prompt_kv = jax.lax.scan(self._rematted(layer), start, stacks)
        return grid.spread(x), None if tapped is None else grid.spread(tapped), prompt_kv

    def _rematted(self, layer):
        """What the backward pass keeps: all of a layer, its products, or its input alone.

        What attention gave counts as a product.
        """
        if self.remat == "full":
            return jax.checkpoint(layer, prevent_cse=False)
        if self.remat == "dots":
            policies = jax.checkpoint_policies
            policy = policies.save_from_both_policies(
                policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(KEPT)
            )
            return jax.checkpoint(layer, policy=policy, prevent_cse=False)
        return layer


def _no_responses(prompts: Tokens) -> Int[Array, "B 0 0"]:
    return jnp.zeros((prompts.ids.shape[0], 0, 0), jnp.int32)


def _responses(row: Float[Array, "B S D"], tokens: Int[Array, "B G T"]) -> Float[Array, "B G T D"]:
    """The part of each row that belongs to its responses, which end it."""
    B, G, T = tokens.shape
    return row[:, row.shape[1] - G * T :].reshape(B, G, T, row.shape[-1])


def _heads_first(x: Float[Array, "B N T KV H"]) -> Float[Array, "B KV N T H"]:
    return x.transpose(0, 3, 1, 2, 4)


def packed(
    model: LanguageModel,
    prompt_lengths: Int[Array, " B"],
    mask: Bool[Array, "B G T"],
    work: Callable[[LanguageModel], Any],
) -> Any:
    """`work(model)` where the batch fits the model's budget, else `work(model.unpacked)`.

    Both give the same, the second at more cost. Call it outside of a gradient: inside, each way
    would store the other's intermediate values too.
    """
    if model.budget is None:
        return work(model)
    fits = model.budget.fits(prompt_lengths, mask)
    return jax.lax.cond(fits, lambda: work(model), lambda: work(model.unpacked))
