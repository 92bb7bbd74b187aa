"""A run, an export or a GGUF file as a model of the lm-evaluation-harness.

    python -m pujax.inference.harness run --model pujax --model_args path=runs/mine --tasks gsm8k

is the harness's own command with this model in it; `pip install 'pujax[lm-eval]'` installs it
(its core has no torch). Nothing else imports this module.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pujax.errors import PujaxError, require
from pujax.files.locate import at_home
from pujax.inference.finished import finished_run
from pujax.inference.generator import Generator, compiled
from pujax.models.decoder import LanguageModel
from pujax.records import check_temperature, check_top_p
from pujax.run.data import with_system
from pujax.types import Params, Tokens, right_padded

if __name__ == "__main__" and find_spec("lm_eval") is None:
    sys.exit("pujax.inference.harness: lm_eval is not installed: pip install 'pujax[lm-eval]'")

_harness: Any = import_module("lm_eval.api.model")
_registry: Any = import_module("lm_eval.api.registry")
_windows: Any = import_module("lm_eval.utils")

CHUNK = 32  # positions whose logits are in memory at once

Ids = list[int]


@_registry.register_model("pujax")
class PujaxLM(_harness.TemplateLM):
    """What the harness asks of a model, by pujax's own decoder.

    `path` is a finished run's directory, or what `pujax.files.weights.load` takes; a run's model
    gets the system message that it was trained with, where a conversation has none. Prompts longer
    than `max_length` tokens (all that the model has positions for) lose their beginning. Raises
    `ConfigError` and what reading a model raises.
    """

    def __init__(
        self,
        path: str,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        del device, max_batch_size  # which the harness gives to any model
        size = str(8 if batch_size in (None, "auto") else batch_size)
        require(size.isdecimal() and int(size) > 0, "batch_size", batch_size, "a positive number")
        directory = at_home(path)
        self._system = None
        if (directory / "config.yaml").is_file():
            self._system = finished_run(directory).system
        self._generator = Generator.load(path)
        self._batch = int(size)
        known = self._generator.model.config.max_positions
        self._length = min(max_length or known, known)
        self._most = max_gen_toks
        require(
            self._length > 1, "max_length", max_length, "must leave room for a prompt and an answer"
        )

    # --- the tokenizer ------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, whose template the harness notes."""
        return self._generator.chat.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps its requests under."""
        return self._generator.chat.source.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The EOS that ends an answer."""
        return self._generator.chat.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it: BOS, or else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Ids:
        """Token ids; a BOS leads them where this tokenizer writes one, and never two."""
        ids = self._generator.chat.encode(string)
        bos = self.tokenizer.bos_token_id
        if add_special_tokens is False or bos is None or ids[:1] == [bos]:
            return ids
        return [bos, *ids] if self.tokenizer("a").input_ids[:1] == [bos] else ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; without `add_generation_prompt` its last turn stays open."""
        turns = with_system(chat_history, self._system)
        text = self._generator.chat.render_text(turns, add_generation_prompt)
        if add_generation_prompt:
            return text
        head, said, _ = text.rpartition(turns[-1]["content"].strip())
        return head + said

    # --- log-likelihoods ----------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Ids, Ids]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """The log-prob of each continuation after its context, and whether greed would take it."""
        del disable_tqdm
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        for places in _batches(order, self._batch):
            pairs = [self._fitted(*requests[i][1:]) for i in places]
            filled = pairs + pairs[-1:] * (self._batch - len(pairs))
            context = _padded([context for context, _ in filled])
            continuation = _padded([continuation for _, continuation in filled])
            sums, greedy = jax.device_get(
                _read(self._generator.model, self._generator.params, context, continuation)
            )
            for row, place in enumerate(places):
                found[place] = float(sums[row]), bool(greedy[row])
                if requests[place][0] is not None:
                    key = requests[place][0]
                    self.cache_hook.add_partial("loglikelihood", key, found[place])
        return [found[i] for i in range(len(requests))]

    def _fitted(self, context: Ids, continuation: Ids) -> tuple[Ids, Ids]:
        """As much of the context's end as there is room for, at least one token."""
        continuation = continuation[-(self._length - 1) :]
        return context[-max(1, self._length - len(continuation)) :], continuation

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-prob of each text, in windows of as many tokens as the model has positions for.

        Each token is predicted once; the last window has as much context as fits.
        """
        totals = []
        for request in requests:
            (text,) = request.args
            windows = _windows.get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._length - 1,
                context_len=1,
            )
            pairs = [(None, *_windows.make_disjoint_window(window)) for window in windows]
            read = self._loglikelihood_tokens(pairs, disable_tqdm)
            totals.append(sum(logp for logp, _ in read))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    # --- answers ------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop sequence, EOS or the limit."""
        del disable_tqdm
        found: dict[int, str] = {}
        groups: dict[tuple[int, float, int, float], list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(self._choices(request.args[1]), []).append(place)
        for (size, temperature, top_k, top_p), members in groups.items():
            run = compiled(self._generator.model, size, temperature, top_k, top_p)
            contexts = {i: self.tok_encode(requests[i].args[0]) for i in members}
            order = sorted(members, key=lambda i: -len(contexts[i]))
            for number, places in enumerate(_batches(order, self._batch)):
                rows = [contexts[i][-(self._length - size) :] for i in places]
                prompts = _padded(rows + rows[-1:] * (self._batch - len(rows)))
                key = jax.random.fold_in(jax.random.key(0), number)
                made = jax.device_get(run(self._generator.params, prompts, key))
                for row, place in enumerate(places):
                    ids = made.tokens[row, 0, : int(made.mask[row, 0].sum())]
                    context, told = requests[place].args
                    found[place] = _until(self._generator.chat.decode(ids.tolist()), told)
                    self.cache_hook.add_partial("generate_until", (context, told), found[place])
        return [found[i] for i in range(len(requests))]

    def _choices(self, told: dict[str, Any]) -> tuple[int, float, int, float]:
        """The length and the filters of sampling; temperature 0 is greed."""
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        size = next((int(told[name]) for name in names if told.get(name)), self._most)
        size = min(size, self._length - 1)
        temperature = float(told.get("temperature") or 0.0)
        if told.get("do_sample") is False:
            temperature = 0.0
        if told.get("do_sample") and not temperature:
            temperature = 1.0
        top_p = float(told.get("top_p") or 1.0)
        check_temperature("temperature", temperature, greedy=True)
        check_top_p("top_p", top_p)
        return size, temperature, int(told.get("top_k") or 0), top_p


def _until(text: str, told: dict[str, Any]) -> str:
    """The text before the first of its stop sequences."""
    stops = told.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text


def _batches(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _padded(rows: Sequence[Sequence[int]]) -> Tokens:
    """Token ids [B S], S a power of two, so that few shapes are compiled."""
    longest = max(len(row) for row in rows)
    return right_padded(rows, max(8, 1 << (longest - 1).bit_length()))


@partial(jax.jit, static_argnums=0)
def _read(
    model: LanguageModel, params: Params, context: Tokens, continuation: Tokens
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """The continuations' summed log-probs, and whether each of their tokens is the likeliest."""
    states = model.extend(params, context, continuation.ids[:, None, :-1])
    hidden = states.predicting[:, 0]
    B, T = continuation.ids.shape
    size = min(CHUNK, T)

    def judged(part: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = model.unembed(params, part[0]).astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, part[1][..., None], axis=-1)[..., 0]
        logps = chosen - jax.nn.logsumexp(logits, axis=-1)
        return logps, chosen >= logits.max(axis=-1)

    def chunks(values: Array) -> Array:
        return values.reshape(B, T // size, size, *values.shape[2:]).swapaxes(0, 1)

    logps, best = jax.lax.map(judged, (chunks(hidden), chunks(continuation.ids)))
    logps, best = (part.swapaxes(0, 1).reshape(B, T) for part in (logps, best))
    mask = continuation.mask
    return jnp.sum(logps, axis=1, where=mask), jnp.all(best | ~mask, axis=1)


def main() -> None:
    """The harness's own command; what is wrong from outside is said in one line."""
    try:
        import_module("lm_eval.__main__").cli_evaluate()
    except PujaxError as error:
        sys.exit(f"pujax.inference.harness: {error}")


if __name__ == "__main__":
    main()
