"""Which rows and seeds a command is about: ``ON=`` and ``SEEDS=``."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from common.errors import ConfigurationError
from common.limits import LARGEST_SEED


def select(stems: Iterable[str], on: str) -> list[str]:
    """The stems that a selection means, sorted.

    Args:
        stems: All there are.
        on: Words separated by spaces. A word that is a stem means that stem alone; one with ``*``,
            ``?`` or ``[`` is a pattern; any other is the beginning of stems, up to an underscore
            where some go on with one: ``cifar10`` does not mean ``cifar100``.
    """
    known = sorted(stems)
    found: set[str] = set()
    for word in on.split() or ["*"]:
        patterns = [word] if set(word) & set("*?[") else [word, f"{word}_*", f"{word}*"]
        matches = ([s for s in known if s == word or fnmatchcase(s, p)] for p in patterns)
        found.update(next(filter(None, matches), []))
    return sorted(found)


def parse_seeds(text: str) -> list[int]:
    """The seeds that a text such as ``0 1 2`` names, each once.

    Raises:
        ConfigurationError: If it names none, one that is too large, or something else.
    """
    words = text.replace(",", " ").split()
    is_seed = (w.isdecimal() and len(w) <= 10 and int(w) <= LARGEST_SEED for w in words)
    if not words or not all(is_seed):
        raise ConfigurationError(
            f'SEEDS is {text[:80]!r}, expected numbers from 0 to {LARGEST_SEED}, as in "0 1 2"'
        )
    return list(dict.fromkeys(map(int, words)))
