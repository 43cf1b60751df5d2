"""What the whole suite shares."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

SLOW = [HealthCheck.too_slow]
# The same examples every time, however busy the machine is: what fails here fails for whoever looks into it.
settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=SLOW)
settings.load_profile("steady")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, or one worker ends with them while the others have nothing to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Every training has garbage collected; half a million objects of imports need not be looked at again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Or some modules call them leaked."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real models and text beside the checkout; tests that need them skip where they are absent."""
    place = Path(os.environ.get("COMPRESSKIT_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (place / "models").is_dir():
        pytest.skip(f"no test data at {place}; set COMPRESSKIT_TEST_DATA to try with some")
    return place


@pytest.fixture(autouse=True, scope="session")
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite leaves the user's own cache alone."""
    place = tmp_path_factory.mktemp("cache")
    os.environ["COMPRESSKIT_CACHE"] = str(place)
    return place
