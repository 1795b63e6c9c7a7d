"""Text from strangers, made visible and bounded, before any page or terminal sees it."""


def printable(text: str, max_chars: int = 300) -> str:
    """Show every character that is not plainly printable as its code point, and cut long text in the middle.

    Control characters (ANSI escapes, newlines), bidirectional overrides, zero-width characters, odd spaces
    and lone surrogates come out as `<U+202E>`. HTML and rich markup are *not* escaped here: the template's
    autoescape and `rich.text.Text` do that where the text is placed.

    Args:
        text: Any string, of any length.
        max_chars: Longest stretch of the original kept, >= 2; what is cut is replaced by `…`.

    Returns:
        Text for which `str.isprintable()` holds and that encodes as UTF-8.
    """
    if len(text) > max_chars:
        head = max_chars * 2 // 3
        text = f"{text[:head]}…{text[len(text) - (max_chars - head) :]}"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else f"<U+{ord(char):04X}>" for char in text)
