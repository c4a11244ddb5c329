"""Which texts does a share of a corpus take, so that equal texts are always taken together?"""

from hashlib import blake2b


def draw(text: str, key: str) -> float:
    """A number in [0, 1): always the same for one text and key, unrelated for another text or another key."""
    digest = blake2b(text.encode(), digest_size=8, key=key.encode()[:64]).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53  # as many bits as a float holds: never rounded up to 1
