import fcntl
import gc
import os
import signal
import sys
from pathlib import Path

from quick import XLA_FLAGS

# Eight devices, so that meshes are tested; set before jax starts.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {XLA_FLAGS}"
)
# A collective blocks its thread, and a device may wait in several at once: with a thread or two a
# core, as is the default, eight devices on two cores run out of them and wait for ever.
os.environ.setdefault("PJRT_NPROC", "64")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Torch's threads spin while they wait for each other; here each core has a process of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from campaign import CACHE as OF_COMMANDS
from campaign import uninterrupted

from pujax.method import labels
from pujax.models.decoder import DecoderConfig, LanguageModel
from pujax.types import Batch, Tokens

# With these libraries loaded a collection takes long, and finds next to nothing: a tenth of the
# tests' time where each 700 objects begin one.
gc.set_threshold(20_000, 20, 20)
# Under nohup a process has it ignored, and so would those that tests start and close terminals of.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
jax.config.update("jax_numpy_rank_promotion", "raise")
# What took a moment to compile is kept for the next run.
CACHE = Path(__file__).parents[1] / ".pytest_cache" / "xla"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def pytest_configure(config: pytest.Config) -> None:
    """Commands that tests start have no torch; xdist's workers are processes that do."""
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        before = os.environ.get("PYTHONPATH")
        paths = [str(Path(__file__).with_name("torchless")), *([before] if before else [])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is slow goes first: begun last, a long test leaves one of two processes without work."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request):
    """A command that a test calls sets what is the process's; the next test has it as it was."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    hook, environment, settings = sys.unraisablehook, dict(os.environ), dict(jax.config.values)
    yield
    for number, handler in signals.items():
        signal.signal(number, handler)
    sys.unraisablehook = hook
    if directory := request.node.funcargs.get("tmp_path"):  # another test's mine.py is another
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", None) or "").startswith(f"{directory}{os.sep}"):
                del sys.modules[name]
    for name in (environment.keys() | os.environ.keys()) - {"PYTEST_CURRENT_TEST"}:
        if name not in environment:
            del os.environ[name]
        elif os.environ.get(name) != environment[name]:
            os.environ[name] = environment[name]
    assert jax.config.values == settings
    assert not labels._absent.get()


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """A run of campaign.py's that nothing interrupted, to be read alone, and what it said.

    The processes of one session share it: the first to need it trains, and another waits.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    run, said = folder / "whole" / "run", folder / "whole" / "said"
    said.parent.mkdir(exist_ok=True)
    with (folder / "whole" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            said.write_text(uninterrupted(run, OF_COMMANDS))
    return run, said.read_text()


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    """A tiny student whose EOS ids are 2 and 5."""
    return LanguageModel(
        DecoderConfig(
            family="llama",
            vocab=96,
            width=32,
            layers=3,
            heads=4,
            kv_heads=2,
            head_width=8,
            mlp_width=64,
            norm_eps=1e-5,
            rope_base=10_000.0,
            tied=True,
            eos_ids=(2, 5),
        )
    )


@pytest.fixture(scope="session")
def params(model):
    """Random parameters, large enough that the next-token distributions are far from flat."""
    return jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, model.init_params(jax.random.key(0)))


@pytest.fixture(scope="session")
def prompts():
    """Four right-padded prompts of 3, 7, 1 and 5 tokens."""
    rng = np.random.default_rng(0)
    lengths = np.array([3, 7, 1, 5], np.int32)
    tokens = rng.integers(6, 96, (4, 7)).astype(np.int32)
    return np.where(np.arange(7)[None] < lengths[:, None], tokens, 0), lengths


@pytest.fixture(scope="session")
def batch():
    """Eight prompts with anchors and reference prompts, the last anchor cut off."""
    rng = np.random.default_rng(1)

    def rows(size, lengths):
        tokens = jnp.array(rng.integers(6, 96, (8, size)), jnp.int32)
        lengths = jnp.array(lengths, jnp.int32)
        return Tokens(jnp.where(jnp.arange(size)[None] < lengths[:, None], tokens, 0), lengths)

    return Batch(
        prompts=rows(6, [3, 6, 1, 5, 2, 4, 6, 3]),
        anchors=rows(5, [4, 5, 2, 3, 5, 1, 4, 4]),
        anchor_finished=jnp.array([True] * 7 + [False]),
        references=rows(7, [4, 7, 2, 6, 3, 5, 7, 4]),
    )
