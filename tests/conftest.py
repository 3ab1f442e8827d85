"""Test-wide settings: 8 simulated CPU devices, two tiers, and the folder of real data and weights."""

import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Eight simulated devices share two cores: a slow rendezvous is no deadlock.
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600",
        "--xla_cpu_collective_call_terminate_timeout_seconds=1200",
        "--xla_cpu_collective_timeout_seconds=1200",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxllm.processes.environment import prepare_backends

prepare_backends()

import jax  # noqa: E402
import pytest  # noqa: E402

pytest.register_assert_rewrite("tests.support")

SHARED = Path(os.environ.get("JAXLLM_SHARED", Path(__file__).parents[2] / "shared"))
REQUIRE_SHARED = os.environ.get("JAXLLM_REQUIRE_SHARED") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the full tier too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The plain tier leaves out `full` tests; `gpu` tests need a GPU."""
    has_gpu = jax.default_backend() == "gpu"
    kept, dropped = [], []
    for item in items:
        wanted = config.getoption("--full") or "full" not in item.keywords
        (kept if wanted and (has_gpu or "gpu" not in item.keywords) else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets, weights and golden files (setting JAXLLM_SHARED)."""
    if not SHARED.is_dir():
        if REQUIRE_SHARED:
            pytest.fail(f"JAXLLM_REQUIRE_SHARED=1 and {SHARED} is missing")
        pytest.skip(f"needs real data and weights; {SHARED} is missing (set JAXLLM_SHARED)")
    return SHARED


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that huggingface_hub takes for its own (see hub_cache)."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _cheap_compilation(request: pytest.FixtureRequest):
    """Compiles without optimization, at half the time, unless the test is marked `optimized`."""
    jax.config.update("jax_disable_most_optimizations", "optimized" not in request.keywords)


_seconds: dict[str, float] = defaultdict(float)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None):
    start = time.monotonic()
    try:
        return (yield)
    finally:
        _seconds[item.nodeid.split("::")[0]] += time.monotonic() - start


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if hasattr(report, "node"):  # with several workers, the controller sees only reports
        _seconds[report.nodeid.split("::")[0]] += report.duration


def pytest_terminal_summary(terminalreporter) -> None:
    terminalreporter.section("seconds by file")
    for file, seconds in sorted(_seconds.items(), key=lambda kv: -kv[1]):
        terminalreporter.write_line(f"{seconds:7.1f}  {file}")


@pytest.fixture
def heeded_ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where a shell started the tests with `&` and so made them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
