"""The compiled libraries: loaded, or built first where no packaged one serves; and what the machine is."""

from __future__ import annotations

from se_fused import build

from .part import Part


def main() -> None:
    part = Part(__doc__ or "")
    for _, name in part.each(["cpu"] if part.device.type == "cpu" else ["cpu", "cuda"]):
        part.say(f"  {build.library(name).parent.name}")
    part.finish()


if __name__ == "__main__":
    main()
