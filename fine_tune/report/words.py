"""The report's language: its sentences stand in ``languages/``, its numbers are written in its own style."""

import math
from pathlib import Path
from typing import Any, Literal

import yaml

Language = Literal["en", "id"]
LANGUAGES: tuple[Language, ...] = ("en", "id")
FOLDER = Path(__file__).parent / "languages"
DECIMAL_COMMA = str.maketrans(",.", ".,")


class Words:
    """Sentences and numbers of a language.

    Args:
        language: en or id.
    """

    def __init__(self, language: Language = "en") -> None:
        self.language = language
        self.texts: dict[str, str] = yaml.safe_load(
            (FOLDER / f"{language}.yaml").read_text("utf-8")
        )

    def __call__(self, key: str, /, **values: Any) -> str:
        """Return the sentence of a key; numbers among its values are written in the language's style."""
        shown = {k: v if isinstance(v, str) else self.number(v) for k, v in values.items()}
        return self.texts[key].format(**shown)

    def known(self, key: str, otherwise: str) -> str:
        """Return the word of a key that may be none of ours."""
        return self.texts.get(key, otherwise)

    def number(self, value: Any, digits: int = 4) -> str:
        """Write a number: whole ones with thousands, others with so many significant digits; or what is none."""
        if isinstance(value, bool) or value is None:
            return self("yes" if value else "no")
        if not isinstance(value, int | float):
            return str(value)
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
        if not abs(value) < 1e300:
            return str(value)[:20] + "…"
        whole = isinstance(value, int) or (abs(value) >= 1000 and digits <= 4)
        text = f"{value:,.0f}" if whole else f"{value:.{digits}g}"
        return self.localized(text)

    def share(self, value: float, decimals: int = 1) -> str:
        """Write a share as a percentage."""
        return self.localized(f"{100 * value:,.{decimals}f}") + " %"

    def fixed(self, value: float, decimals: int) -> str:
        """Write a number with so many decimals."""
        return self.localized(f"{value:,.{decimals}f}")

    def rate(self, value: float) -> str:
        """Write a learning rate, like 1.96e-04."""
        return self.localized(f"{value:.2e}")

    def seconds(self, value: float) -> str:
        """Write a duration."""
        if not 10 <= value < 1e9:
            return f"{self.localized(f'{value:.2g}')} {self('unit_s')}"
        minutes, rest = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        if hours:
            return f"{hours} {self('unit_h')} {minutes:02d} {self('unit_min')}"
        if minutes:
            return f"{minutes} {self('unit_min')} {rest:02d} {self('unit_s')}"
        return f"{rest} {self('unit_s')}"

    def localized(self, text: str) -> str:
        """Swap decimal point and comma where the language does."""
        return text.translate(DECIMAL_COMMA) if self.language == "id" else text
