"""What all tests share: the data and networks that some need, and the rule about what may skip."""

import functools
import os

import pytest
from hypothesis import settings

# Examples are drawn the same way each time; the first one pays for torch's start-up, so there is no deadline.
settings.register_profile("course", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("course")

# On the machines that must skip nothing: a missing browser, data set or network fails there.
MUST_RUN = os.environ.get("TMLCOURSE_CI") == "1"


def skip_or_fail(reason):
    """Leave a test out with a reason, except in continuous integration."""
    (pytest.fail if MUST_RUN else pytest.skip)(reason)


# After a second build of the book, only the pages that it changed are checked.
CHANGED_PAGES = os.environ.get("TMLCOURSE_PAGES")
whole_book = pytest.mark.skipif(CHANGED_PAGES is not None, reason="only some pages of the book have changed")


def checked(pages):
    """Those of the book's pages that the tests of the built book look at."""
    return [page for page in pages if CHANGED_PAGES is None or page in CHANGED_PAGES.split()]


# A chapter lasts a minute or two: all of them on one worker, or begun last, would keep the other workers waiting.
CHAPTER = "test_the_chapter_runs_alone"


def pytest_collection_modifyitems(items):
    """Chapters come first."""
    items.sort(key=lambda item: CHAPTER not in item.name)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """What workers that run side by side take in one piece: a file, for its fixtures; but each chapter alone."""
    from xdist.scheduler import LoadScopeScheduling

    class FilesAndChapters(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid if CHAPTER in nodeid else nodeid.split("::")[0]

    return FilesAndChapters(config, log)


@pytest.fixture(scope="session", autouse=True)
def no_download():
    """Tests download nothing: they see what $TMLCOURSE_DATA, the cache and the package hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMLCOURSE_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def mnist(no_download):
    """The MNIST test set, 10,000 images."""
    from tmlcourse import data

    try:
        return data.load("mnist")
    except FileNotFoundError as error:
        skip_or_fail(f"needs MNIST: {error}")


@pytest.fixture(scope="session")
def published(no_download):
    """A function: the name of a published network -> the network, in evaluation mode."""
    from tmlcourse import pretrained

    @functools.cache
    def load(name):
        try:
            return pretrained.load(name)
        except FileNotFoundError as error:
            skip_or_fail(f"needs the published network {name}: {error}")

    return load
