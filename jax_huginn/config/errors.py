"""What a person can mend, said in one line, whatever the text was made of."""

LONGEST = 1000  # characters


class OneLineError(ValueError):
    """Its text is one line of printable characters: names and values in it may come from a damaged file."""

    def __init__(self, text: str):
        shown = "".join(character if character.isprintable() else "?" for character in text)
        super().__init__(shown if len(shown) <= LONGEST else shown[:LONGEST] + "...")
