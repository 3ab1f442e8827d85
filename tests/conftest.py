"""Test-wide settings: 8 simulated CPU devices, three tiers, budgets, and the folder of real data and weights."""

import atexit
import json
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers, and the commands that tests start, share one cache
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxllm-programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

from jaxllm.processes.environment import prepare_backends

prepare_backends()

import jax  # noqa: E402
import pytest  # noqa: E402

from jaxllm.core.versions import environment  # noqa: E402

pytest.register_assert_rewrite("tests.support")

SHARED = Path(os.environ.get("JAXLLM_SHARED", Path(__file__).parents[2] / "shared"))
REQUIRE_SHARED = os.environ.get("JAXLLM_REQUIRE_SHARED") == "1"


# The most programs that a file may compile in the full tier, by its path. Unlike seconds they are the same everywhere.
BUDGETS: dict[str, int] = json.loads((Path(__file__).parent / "budgets.json").read_text())
# What a file without an entry may compile.
SMALL = 40
TABLES = Path(__file__).parents[1] / "scripts" / "bench" / "results" / "tables.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the full tier too")
    parser.addoption("--tables", action="store_true", help="run the tables alone, and store what came out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests of the tier. `gpu` tests need a GPU. A file, or its part for one family, has one worker."""
    has_gpu = jax.default_backend() == "gpu"
    kept, dropped = [], []
    for item in items:
        if config.getoption("--tables"):
            wanted = "tables" in item.keywords
        else:
            wanted = "tables" not in item.keywords and (config.getoption("--full") or "full" not in item.keywords)
        (kept if wanted and (has_gpu or "gpu" not in item.keywords) else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    if hasattr(config, "workerinput"):
        for item in kept:
            family = getattr(item, "callspec", None) and item.callspec.params.get("family")
            item.add_marker(pytest.mark.xdist_group(f"{_file_of(item)} {family or ''}".strip()))
        kept.sort(key=lambda item: -BUDGETS.get(_file_of(item), 0))  # the longest first, so that workers end together
    items[:] = kept


def _file_of(item: pytest.Item) -> str:
    return item.nodeid.split("::")[0]


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


_seconds: Counter[str] = Counter()
_programs: Counter[str] = Counter()
_running = ""


def _count(event: str, seconds: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":  # compiled, or read from the cache
        _programs[_running] += 1


jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None):
    global _running
    if _running != (file := _file_of(item)):
        jax.clear_caches()  # so that a file compiles the same programs whatever ran before it
        _running = file
    start = time.monotonic()
    try:
        return (yield)
    finally:
        _seconds[file] += time.monotonic() - start


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if hasattr(report, "node"):  # with several workers, the controller sees only reports
        _seconds[report.nodeid.split("::")[0]] += report.duration


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    _programs.update(getattr(node, "workeroutput", {}).get("programs", {}))


def _over_budget() -> dict[str, int]:
    return {file: count for file, count in _programs.items() if count > BUDGETS.get(file, SMALL)}


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["programs"] = dict(_programs)
    elif _over_budget() and not exitstatus and not session.config.getoption("--tables"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.section("seconds, and programs of those allowed, by file")
    for file, seconds in _seconds.most_common():
        allowed = BUDGETS.get(file, SMALL)
        terminalreporter.write_line(f"{seconds:7.1f}  {_programs[file]:4} of {allowed:4}  {file}")
    if config.getoption("--tables"):
        _store_tables(terminalreporter.stats)
        return
    for file, count in _over_budget().items():
        terminalreporter.write_line(
            f"{file} compiles {count} programs and may compile {BUDGETS.get(file, SMALL)}: share programs between its "
            "tests or move some to the tables; or raise its budget in tests/budgets.json and lower another",
            red=True,
        )


def _store_tables(stats: dict[str, list[Any]]) -> None:
    """Writes which tests of the tables passed, for which commit, when and where."""
    outcomes = {
        report.nodeid.split("@")[0]: outcome for outcome in ("passed", "failed") for report in stats.get(outcome, [])
    }
    if not outcomes:  # collected only
        return
    result = {"date": datetime.now(UTC).date().isoformat(), **environment(), "outcomes": outcomes}
    TABLES.write_text(json.dumps({name: value for name, value in result.items() if name != "command"}, indent=2) + "\n")


@pytest.fixture
def heeded_ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where a shell started the tests with `&` and so made them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
