import pytest

from ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Four ranks."""
    own = Ranks(4, str(tmp_path_factory.mktemp("ranks") / "store"))
    yield own
    own.close()
