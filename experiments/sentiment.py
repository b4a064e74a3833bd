"""Makes prompts with answers, a JSONL file, of the rated film reviews in the source release of vaderSentiment.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    python experiments/sentiment.py vaderSentiment-3.3.2.tar.gz sentiment.jsonl

Snippets of film reviews with the mean rating of 20 people, from -4 to 4 (Hutto and Gilbert, ICWSM 2014; MIT licence);
those of at least 1 in size are used. The template is MeZO's for sentiment: "<text> It was" and " great" or " terrible".
"""

import argparse
import io
import json
import tarfile
from pathlib import Path

INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATED = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def content(archive: bytes, member: str) -> bytes:
    """A member of an archive of which nothing is written to the disk."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        return opened.extractfile(member).read()


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    lines = content(content(given.archive.read_bytes(), INNER), RATED).decode("utf-8", "replace").splitlines()
    rated = [(float(rating), text.strip()) for _, rating, text in (line.split("\t", 2) for line in lines)]
    rows = [
        {"prompt": f"{text} It was", "completion": " great" if rating > 0 else " terrible"}
        for rating, text in rated
        if abs(rating) >= 1
    ]
    given.file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    good = sum(row["completion"] == " great" for row in rows)
    print(f"wrote {given.file}: {len(rows)} snippets, {good} of them good")


if __name__ == "__main__":
    main()
