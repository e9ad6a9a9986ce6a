"""The colours of pictures, by name: one palette for light backgrounds, one for dark, chosen together.

The six colours of series are distinct for people with any kind of colour blindness, and contrast with the background by at
least 3:1 (WCAG 2.2, success criterion 1.4.11). Lines also differ in dash and marker, for print in grey.

A picture names its colours `var(--ink, #1c1f24)`; the page sets the variables for dark backgrounds. On paper, and outside a
page, the light ones apply.
"""

from dataclasses import dataclass

__all__ = ["DARK", "LIGHT", "Palette"]


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Colours as #rrggbb."""

    ground: str
    ink: str
    """Text and axes."""
    muted: str
    """Secondary text, reference lines."""
    grid: str
    """Hairlines."""
    shade: str
    """Regions."""
    series: tuple[str, ...]
    """In the order of use."""

    def variables(self) -> dict[str, str]:
        """The colours by their names in pictures and pages."""
        plain = {name: getattr(self, name) for name in ("ground", "ink", "muted", "grid", "shade")}
        return plain | {f"series-{i}": colour for i, colour in enumerate(self.series, 1)}


LIGHT = Palette(
    ground="#ffffff",
    ink="#1c1f24",
    muted="#5c636e",
    grid="#dfe2e7",
    shade="#eef0f4",
    series=("#33469b", "#b53704", "#328173", "#d566ba", "#969037", "#803145"),
)
DARK = Palette(
    ground="#16181d",
    ink="#e8eaee",
    muted="#a2a9b4",
    grid="#343943",
    shade="#22262e",
    series=("#a0aaf7", "#d4552c", "#77efe4", "#a86aa2", "#e9dd3c", "#e48a91"),
)
