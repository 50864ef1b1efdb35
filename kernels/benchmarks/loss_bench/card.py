"""What an NVIDIA card is set to and does: driver, clocks, power, and what slows it, as nvidia-smi tells it.

A throughput belongs to a clock and a power limit: cards of one name are sold and configured with
different ones. What nobody says is "not known": without nvidia-smi the driver's version still
stands in /proc.

What is not covered: cards of other vendors, and clocks over time (one reading is one moment).
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

NOT_KNOWN = "not known"
FIELDS = {
    "driver": "driver_version",
    "sm_clock_max_mhz": "clocks.max.sm",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_max_mhz": "clocks.max.memory",
    "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "power_limit_max_w": "power.max_limit",
    "power_draw_w": "power.draw",
    "temperature_c": "temperature.gpu",
    "slowed_by": "clocks_event_reasons.active",
}
"""Our names, with the unit, and nvidia-smi's."""
OLD_NAMES = {"clocks_event_reasons.active": "clocks_throttle_reasons.active"}
"""Of drivers before 535."""

# nvml.h, nvmlClocksEventReason*
REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
    0x100: "display clocks",
}
DRIVER_FILE = Path("/proc/driver/nvidia/version")
TIMEOUT_S = 10


def read_card(uuid: str) -> dict[str, str]:
    """The present state of a card.

    Args:
        uuid: as torch and nvidia-smi write it, with or without "GPU-".

    Returns:
        The keys of FIELDS; numbers as nvidia-smi writes them; NOT_KNOWN where it does not say.
    """
    card = "GPU-" + uuid.removeprefix("GPU-")
    new = list(FIELDS.values())
    values = _ask(card, new) or _ask(card, [OLD_NAMES.get(name, name) for name in new])
    state = dict.fromkeys(FIELDS, NOT_KNOWN) if values is None else dict(zip(FIELDS, values, strict=True))
    if state["driver"] == NOT_KNOWN:
        state["driver"] = _driver_of_the_kernel()
    state["slowed_by"] = reasons(state["slowed_by"])
    return state


def reasons(mask: str) -> str:
    """Names of the bits of a mask such as "0x0000000000000004"; "nothing" for 0, NOT_KNOWN for no number."""
    try:
        bits = int(mask, 16)
    except ValueError:
        return NOT_KNOWN
    names = [name for bit, name in REASONS.items() if bits & bit]
    if bits & ~sum(REASONS):
        names.append(f"0x{bits & ~sum(REASONS):x}")
    return ", ".join(names) or "nothing"


def _ask(card: str, fields: list[str]) -> list[str] | None:
    """Values of nvidia-smi's fields, or None where it is absent or refuses."""
    command = [
        "nvidia-smi",
        f"--id={card}",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode != 0 or len(values) != len(fields):
        return None
    return [NOT_KNOWN if value.startswith("[") or not value else value for value in values]


def _driver_of_the_kernel() -> str:
    try:
        found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", DRIVER_FILE.read_text())
    except OSError:
        return NOT_KNOWN
    return found.group(1) if found else NOT_KNOWN
