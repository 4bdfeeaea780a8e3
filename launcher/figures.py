"""What preflight measures, and what it knows of a rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """Something measured on every rank; more is better.

    Attributes:
        name: In the report, and in `--minimum`; ends in the unit.
        meaning: In sentences.
        heading: Of its column, lines with the unit last.
        lowest_share: A rank with less than this share of the median is an outlier; 0 if none is.
        outlier_fails: Whether that is a failure, or a warning: file systems and other programs' memory are uneven on
            healthy machines.
        of_all: Whether all ranks measure one thing together; it has no column, and its slowest rank counts.
    """

    name: str
    meaning: str
    heading: str
    lowest_share: float = 0.0
    outlier_fails: bool = False
    of_all: bool = False

    @property
    def unit(self) -> str:
        return self.heading.rpartition("\n")[2]

    def text(self, value: float) -> str:
        """Three digits that count, and all before the point."""
        return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


LINK_WITHIN_NODE, LINK_BETWEEN_NODES = "link_within_node_gb_per_second", "link_between_nodes_gb_per_second"
SHARED_MEMORY = "shared_memory_gib"

FIGURES = (
    Figure("matrix_products_tflops", "matrix products", "matmul\nTFLOP/s", 0.7, outlier_fails=True),
    Figure("device_memory_gib", "free device memory", "device\nGiB", 0.9, outlier_fails=True),
    Figure("host_memory_gib", "free host memory", "host\nGiB", 0.5),
    Figure(SHARED_MEMORY, "free shared memory (/dev/shm)", "shm\nGiB", 0.5),
    Figure("disk_write_mb_per_second", "writing to disk", "write\nMB/s", 0.2),
    Figure("disk_read_mb_per_second", "reading from disk", "read\nMB/s", 0.2),
    Figure("disk_free_gib", "free disk space", "disk\nGiB"),
    Figure(LINK_WITHIN_NODE, "link within the node", "link in\nGB/s", 0.5, outlier_fails=True),
    Figure(LINK_BETWEEN_NODES, "link between nodes", "link out\nGB/s", 0.5, outlier_fails=True),
    Figure("all_reduce_gb_per_second", "all-reduce", "GB/s", of_all=True),
    Figure("all_reduces_per_second", "all-reduces of one number", "a second", of_all=True),
    Figure("all_to_all_gb_per_second", "all-to-all", "GB/s", of_all=True),
)


@dataclass(frozen=True)
class RankReport:
    """What a rank has measured and found.

    Attributes:
        rank: Its number.
        node: Its node's name.
        device: What it computes on, in words.
        figures: By name; what could not be measured, or does not exist here, is absent.
        facts: What must be the same everywhere, such as versions and the dataset's fingerprint, by name.
        variables: Of the environment, that steer communication.
        clock_skew_seconds: How far its clock is ahead of rank 0's.
        errors: Messages of checks that failed here, by check.
    """

    rank: int
    node: str
    device: str
    figures: dict[str, float]
    facts: dict[str, str]
    variables: dict[str, str]
    clock_skew_seconds: float
    errors: dict[str, str]
