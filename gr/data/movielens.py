"""MovieLens-1M: a folder with ratings.dat and movies.dat, fields separated by ``::``, Latin-1.

Every rating is an interaction, whatever its stars (the usual reading of MovieLens as implicit feedback).
"""

from collections.abc import Iterator
from pathlib import Path

from gr.data import lines
from gr.data.dataset import Item
from gr.data.readers import Rows, Source, unix_seconds
from gr.errors import UserError


def read_movielens(folder: Path) -> Source:
    """``ratings.dat`` (user::movie::rating::Unix seconds) and ``movies.dat`` (movie::title::genre|genre).

    Movies that nobody rated are left out, as in the published counts (3,706 of 3,883 remain).
    """
    ratings, movies = folder / "ratings.dat", folder / "movies.dat"
    for file in (ratings, movies):
        if not file.is_file():
            raise UserError(f"{file}: missing; a MovieLens-1M folder has ratings.dat and movies.dat")
    rows = Rows()
    catalogue: list[Item] = []
    for number, (key, title, genres) in _fields(movies, ("movie", "title", "genres")):
        if key in rows.item_of:
            raise UserError(f"{movies}:{number}: movie {key} appears a second time")
        rows.item_of[key] = len(catalogue)
        catalogue.append(Item(key, title, tuple(genres.split("|"))))
    for number, (user, movie, _, time) in _fields(ratings, ("user", "movie", "rating", "timestamp")):
        if movie not in rows.item_of:
            raise UserError(f"{ratings}:{number}: movie {movie} is not in {movies}")
        if not user:
            raise UserError(f"{ratings}:{number}: no user")
        seconds = int(time) if time.isascii() and time.isdigit() else time
        rows.add(user, movie, unix_seconds(seconds, "timestamp", ratings, number))
    users, codes, times = rows.columns()
    return Source(catalogue, list(rows.user_of), users, codes, times, keep_unused_items=False)


def _fields(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    for number, line in lines.read_lines(path):
        fields = line.decode("latin-1").split("::")
        if len(fields) != len(columns):
            raise UserError(f"{path}:{number}: {len(fields)} fields, expected {'::'.join(columns)}")
        yield number, fields
