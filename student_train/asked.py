"""What manner and curriculum ask of a source's rows, found out once, when it is opened."""

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tokenizers import Tokenizer

from shared.errors import ConfigError
from shared.progress import progress
from shared.rows import Bool
from student_train.data_config import Manner, MannerSettings, SourceSettings
from student_train.facts import Facts
from student_train.manner import Thinking, require_known
from student_train.source_protocol import Manners, Source

logger = logging.getLogger("logitferry")

OUTLINE_READERS = 2


def as_asked(source: Source, settings: SourceSettings, tokenizer: Tokenizer) -> Source:
    """With what manner and curriculum ask of rows, and without those of another manner."""
    manner, curriculum = settings.manner, settings.curriculum
    by_tags = manner is not None and manner.by == "tags"
    facts = manners = None
    if by_tags or (curriculum is not None and curriculum.asks_rows):
        thinking = Thinking.of(tokenizer, manner.tags, source.in_pieces) if manner is not None and by_tags else None
        facts = read_facts(source, thinking)
    if manner is None and facts is None:
        return source
    num_rows = sum(map(len, source.sample_ids))
    is_taken_R = np.ones(num_rows, dtype=np.bool_)
    if manner is not None:
        thinks_R = facts.thinks_R if facts is not None and by_tags else _thinks_by_origin(source, manner)
        num_thinking = int(thinks_R.sum())
        counts: dict[Manner, int] = {"reasoning": num_thinking, "fast": num_rows - num_thinking}
        logger.info("%s: %s", source.name, _manners_line(counts))
        named: list[Manner] = [manner.take] if isinstance(manner.take, str) else list(manner.take)
        for wanted in named:
            if not counts[wanted]:
                raise ConfigError(
                    f"{source.name}: no row is {wanted}: {_manners_line(counts)}",
                    next_step="take the other manner, or mend manner.tags or manner.reasoning_sources",
                )
        if isinstance(manner.take, str):
            is_taken_R = thinks_R == (manner.take == "reasoning")
        manners = Manners(thinks_R=thinks_R[is_taken_R], counts=counts)
    facts = None if facts is None else facts.where(is_taken_R)
    return source.taking(by_block(source, is_taken_R), facts, manners)


def by_block(source: Source, values_R: NDArray[Any]) -> list[NDArray[Any]]:
    """What is known of each row of a source, block by block."""
    return np.split(values_R, np.cumsum([len(block) for block in source.sample_ids])[:-1])


def read_facts(source: Source, thinking: Thinking | None) -> Facts:
    """Of all rows; of a dataset all shards are read and verified, but kept ids and tails are not decoded."""
    count = len(source.sample_ids)
    with progress("look at rows", count, "blocks") as ticker, ThreadPoolExecutor(OUTLINE_READERS) as readers:

        def look(index: int) -> Facts:
            found = Facts.of(source.read_outline(index), thinking)
            ticker.advance(1)
            return found

        try:
            return Facts.concatenate(list(readers.map(look, range(count))))
        except BaseException:
            readers.shutdown(wait=False, cancel_futures=True)
            raise


def _thinks_by_origin(source: Source, manner: MannerSettings) -> Bool:
    origins = pa.chunked_array([source.origins(index) for index in range(len(source.sample_ids))], pa.string())
    require_known(manner.reasoning_sources, set(origins.unique().to_pylist()), source.name)
    reasoning = pa.array(manner.reasoning_sources, pa.string())
    return pc.call_function("is_in", [origins], pc.SetLookupOptions(reasoning)).to_numpy()


def _manners_line(counts: dict[Manner, int]) -> str:
    return f"{counts['reasoning']:,} reasoning and {counts['fast']:,} fast rows"
