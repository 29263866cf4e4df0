"""What a run shows on the console: the progress line, and a table of completions that can't touch the terminal."""

import math
import shutil
import time
import unicodedata


class Progress:
    """The progress line: every `every` steps, and after the last, the means since the line before.

    `pace` starts when this object is made, so a resumed run's estimate speaks of what is left to it.
    """

    def __init__(self, total_steps: int, every: int, step: int = 0):
        self.total_steps, self.every, self.step = total_steps, every, step
        self._began_step, self._began, self._rows = step, time.monotonic(), []

    def line(self, row: dict) -> str | None:
        """Take one step's metrics; returns the line when one is due."""
        self.step = row["step"]
        self._rows.append(row)
        if self.step % self.every and self.step < self.total_steps:
            return None
        seconds = time.monotonic() - self._began
        left = seconds / max(1, self.step - self._began_step) * (self.total_steps - self.step)
        parts = [f"step {self.step}/{self.total_steps}"]
        for name, label, form in (("reward", "reward", ".3f"), ("loss", "loss", ".4f"), ("kl", "kl", ".4f")):
            if (mean := self._mean(name)) is not None:
                parts.append(f"{label} {mean:{form}}")
        if row.get("learning_rate") is not None:
            parts.append(f"lr {row['learning_rate']:.2e}")
        if (rate := self._mean("tokens_per_second")) is not None:
            parts.append(f"{rate:,.0f} tokens/s")
        parts += [f"{_clock(seconds)} gone", f"{_clock(left)} left"]
        self._rows = []
        return "  ".join(parts)

    def _mean(self, name: str) -> float | None:
        values = [row[name] for row in self._rows if row.get(name) is not None and math.isfinite(row[name])]
        return sum(values) / len(values) if values else None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def table(prompts: list[str], completions: list[str], rewards: list[float | None], width: int | None = None) -> str:
    """Prompts, completions and rewards as plain text, one row each, no wider than the terminal.

    A prompt keeps its end, where the question is; a completion its beginning. Control characters, which could clear or
    repaint the terminal, are shown as escapes.
    """
    width = width or shutil.get_terminal_size((100, 24)).columns
    first = max(8, (width - 12) // 2)
    second = max(8, width - 12 - first)
    lines = [f"{'reward':>8}  {'prompt':<{first}}  completion"]
    for prompt, completion, reward in zip(prompts, completions, rewards, strict=True):
        left = _fit(printable(prompt)[::-1], first)[::-1]
        earned = "none" if reward is None else f"{reward:.3f}"
        lines.append(f"{earned:>8}  {left}{' ' * (first - _columns(left))}  {_fit(printable(completion), second)}")
    return "\n".join(lines)


def printable(text: str, spared: str = "") -> str:
    """Newlines, escape sequences, direction marks and the like as \\n, \\x1b, \\u202e, but for those spared."""
    return "".join(c if c.isprintable() or c in spared else c.encode("unicode_escape").decode() for c in text)


def _columns(text: str) -> int:
    """Columns on the terminal: Chinese characters and emoji take two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _fit(text: str, width: int) -> str:
    """As much of the text's beginning as fits into `width` columns, with … where it was cut."""
    if _columns(text) <= width:
        return text
    end = 0
    while _columns(text[: end + 1]) < width:
        end += 1
    return text[:end] + "…"
