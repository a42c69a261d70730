"""OUT_DIR/figure.png from OUT_DIR/results.json: bandwidths beside that of a copy, and ratios beside their targets."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: Path) -> int:
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is not installed")
        return 0
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = json.loads((folder / "results.json").read_text())["rows"]
    timed = [r for r in rows if r["section"] in ("dense", "small") and r["clock"] == "device" and not r["against"]]
    judged = [r for r in rows if r["target"] is not None and r["ratio"] is not None]
    cases = list(dict.fromkeys(r["case"] for r in timed))
    figure, (left, right) = plt.subplots(1, 2, figsize=(17, 2 + 0.3 * max(4, len(cases), len(judged))))
    for name in dict.fromkeys(r["name"] for r in timed):
        mine = [r for r in timed if r["name"] == name]
        left.plot(
            [r["gb_per_s"] for r in mine],
            [cases.index(r["case"]) for r in mine],
            "|" if name == "copy" else "o",
            markersize=18 if name == "copy" else 6,
            label=name,
        )
    left.set_yticks(range(len(cases)), cases, fontsize=8)
    left.set_xlabel("GB/s, counting what each must move (device clock, median)")
    left.set_xlim(left=0)
    left.invert_yaxis()
    if timed:
        left.legend(fontsize=7)
    # As a share of the target, so that ratios of different kinds share an axis; beyond 1 is good.
    shares = [r["ratio"] / r["target"] if r["wanted"] == ">=" else r["target"] / max(r["ratio"], 1e-9) for r in judged]
    right.barh(range(len(judged)), shares, color=["tab:green" if share >= 1 else "tab:red" for share in shares])
    right.axvline(1.0, color="black", linewidth=1)
    for place, (row, share) in enumerate(zip(judged, shares, strict=True)):
        right.text(
            share, place, f" {row['ratio']:.2f} (wanted {row['wanted']} {row['target']:g})", va="center", fontsize=7
        )
    labels = [f"{r['case']} ({r['clock'] or 'bytes'}) / {r['against']}" for r in judged]
    right.set_yticks(range(len(judged)), labels, fontsize=7)
    right.set_xlim(0, 1.4 * max([1.0, *shares]))
    right.set_xlabel("share of the target reached")
    right.invert_yaxis()
    figure.tight_layout()
    figure.savefig(folder / "figure.png", dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
