"""What counts as a text: whatever UTF-8 can write."""


def is_text(value: object) -> bool:
    """True for a text that UTF-8 can write; half a surrogate pair is none."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
