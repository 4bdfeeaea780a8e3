"""Building and reading datasets, against what limits them and against the ways of others.

    python -m benchmarks.data

Two parts, which take options of their own: `python -m benchmarks.building` and `python -m benchmarks.reading`.
"""

from __future__ import annotations

from benchmarks import building, reading


def main() -> None:
    building.main([])
    reading.main([])


if __name__ == "__main__":
    main()
