"""One rollout: check all that can be checked, load the student once, write what this worker has to do.

Running again goes on: units that are done are kept.  What is drawn depends on seed, prompt and sample alone, so it does
not matter where a run was stopped, how many workers there are, or how large a batch was; see `eval.sampling`.
"""

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.fingerprint import sha256_of_text, tokenizer_fingerprint
from shared.folders import open_folder
from shared.pretrained import context_tokens, load_tokenizer, model_identity
from shared.progress import progress
from shared.vllm_start import require_vllm
from shared.workers import Share, share_of_process
from student_train.eval.generation import Reply
from student_train.rollout.config import RolloutSettings
from student_train.rollout.engines import open_engine
from student_train.rollout.ledger import DATA, PLAN, RESULT, Ledger, UnitRecord
from student_train.rollout.plan import Plan, contents_of, writer_of
from student_train.rollout.prompts import Prompts, data_identity, read_prompts
from student_train.rollout.task import Task
from student_train.rollout.units import UnitWork
from student_train.rollout.verifier import verifier_of

logger = logging.getLogger("logitferry")


def run_rollout(settings: RolloutSettings, *, share: Share | None = None) -> dict[str, Any]:
    """Write what is not done yet of this worker's share; what rollout.json holds, where nothing is left for anybody.

    `share` is by default that of the environment, see `shared.workers`.  `finished` says whether others have units
    left.

    Raises:
        ConfigError: there is nothing to ask, the verifier cannot be had, or the output folder is not ours.
        MismatchError: the output folder belongs to a rollout with other settings, student or data.
        RecordError, DamagedDataError: the data cannot be used.
        OutputError: the output cannot be written; what was committed before stays.
    """
    share = share_of_process(share)
    ledger = Ledger(open_folder(settings.output))
    ledger.output.claim([PLAN])
    if settings.engine == "vllm":
        require_vllm("engine")
    verifier = verifier_of(settings.verify) if settings.verify else None
    tokenizer, context = load_tokenizer(settings.student), context_tokens(settings.student)
    student = model_identity(settings.student, dtype=settings.student.dtype, engine=settings.engine)
    template = tokenizer.chat_template
    known = {
        "fingerprint": tokenizer_fingerprint(tokenizer.backend_tokenizer),
        "chat_template_sha256": sha256_of_text(template) if isinstance(template, str) else None,
    }
    identity = verifier.identity() if verifier else None
    contents = contents_of(settings, student, known, data_identity(settings.data), identity, context)
    where = f"{settings.output}/{PLAN}"
    plan = ledger.plan()
    if plan is not None:
        contents.require_same(plan.contents, where)
        if (result := ledger.result()) is not None and len(ledger.done(plan)) == plan.num_units:
            return result
    prompts = read_prompts(settings, tokenizer, verifier, context_tokens=context)
    ours = Plan(
        model=settings.student.model,
        writer=writer_of(student),
        contents=contents,
        prompts=prompts.digest,
        num_prompts=len(prompts.asked),
        tally=prompts.tally,
    )
    plan = ledger.commit_plan(ours)
    contents.require_same(plan.contents, where)
    plan.require_same_prompts(ours, where)
    done = ledger.done(plan)
    mine = [number for number in range(plan.num_units) if share.has(number)]
    todo = [number for number in mine if number not in done]
    if len(todo) < len(mine):
        logger.info("%d of %d units are done already", len(mine) - len(todo), len(mine))
    work = UnitWork(
        plan=plan,
        prompts=prompts.asked,
        tokenizer=tokenizer,
        verifier=verifier,
        keep=settings.keep,
        seed=settings.seed,
    )
    if todo:
        _write(work, ledger, todo, settings, prompts, dtype=student.dtype, context=context, worker=str(share))
    return _finish(ledger, plan)


def _write(
    work: UnitWork,
    ledger: Ledger,
    todo: Sequence[int],
    settings: RolloutSettings,
    prompts: Prompts,
    *,
    dtype: str,
    context: int | None,
    worker: str,
) -> None:
    """Units, each committed as soon as it is written."""
    num_tokens, begin_s = 0, time.monotonic()
    with progress("rollout", sum(map(work.size, todo)), "replies") as ticker:

        def on_written(replies: Sequence[Reply]) -> None:
            nonlocal num_tokens
            num_tokens += sum(reply.num_tokens for reply in replies)
            ticker.advance(len(replies), f"{num_tokens / (time.monotonic() - begin_s):.3g} tokens/s")

        task = Task(
            settings=settings,
            dtype=dtype,
            tokenizer=work.tokenizer,
            stops=prompts.stops,
            context_tokens=context,
            longest_prompt=max(len(prompt.ids_L) for prompt in prompts.asked),
            on_written=on_written,
        )
        with open_engine(task) as engine:
            last_s = begin_s = time.monotonic()
            for number, replies in zip(todo, engine.write(work.asks(number) for number in todo), strict=True):
                texts, counts = work.texts(number, replies)
                seconds, last_s = time.monotonic() - last_s, time.monotonic()
                process = f"{worker} on {socket.gethostname()}, process {os.getpid()}"
                ledger.commit(number, work.plan, texts, counts=counts, seconds=seconds, worker=process)


def _finish(ledger: Ledger, plan: Plan) -> dict[str, Any]:
    """Write rollout.json where all units are done, by whomever."""
    records = ledger.done(plan)
    if len(records) < plan.num_units:
        return {"finished": False, "units": plan.num_units, "units_done": len(records)}
    result = summary(plan, list(records.values()))
    ledger.finish(result)
    if not result["kept"]:
        logger.warning("not one reply is kept: %s", result["dropped"])
    return result


def summary(plan: Plan, records: Sequence[UnitRecord]) -> dict[str, Any]:
    """What a finished rollout is, from its plan and its units alone, so that whoever writes it writes the same."""
    counts = [record.counts for record in records]
    num_replies, num_tokens = sum(each.replies for each in counts), sum(each.tokens for each in counts)
    right, wrong = sum(each.right for each in counts), sum(each.wrong for each in counts)
    dropped = Counter[str]()
    for each in counts:
        dropped.update(each.dropped)
    seconds = sum(record.seconds for record in records)
    return {
        "finished": True,
        "model": plan.model,
        "student": plan.writer,
        **plan.tally,
        "prompts": plan.num_prompts,
        "samples": plan.samples,
        "replies": num_replies,
        "kept": num_replies - dropped.total(),
        "dropped": dict(sorted(dropped.items())),
        "right": right,
        "wrong": wrong,
        "pass_rate": right / (right + wrong) if right + wrong else None,
        "cut": sum(each.cut for each in counts),
        "mean_reply_tokens": num_tokens / num_replies,
        "mean_nll": sum(each.nll * each.replies for each in counts) / num_replies,
        "seconds": seconds,
        "tokens_per_s": num_tokens / seconds,
        "units": plan.num_units,
        "parts": [part.model_dump() for record in records for part in record.parts],
        "plan": plan.identity,
        "settings": plan.contents.settings,
    }


def describe(result: dict[str, Any], output: str) -> list[str]:
    """For people."""
    if not result["finished"]:
        return [f"{output}: {result['units_done']} of {result['units']} units are done; others have the rest"]
    lines = [
        f"{output}/{RESULT}: {result['kept']:,} of {result['replies']:,} replies to {result['prompts']:,} prompts kept",
        f"  {result['mean_reply_tokens']:.0f} tokens in a reply, mean −log p {result['mean_nll']:.3f}, "
        f"{result['tokens_per_s']:,.0f} tokens/s",
    ]
    if result["pass_rate"] is not None:
        lines.append(f"  {100 * result['pass_rate']:.1f} % of those that can be marked are right")
    lines += [f"  dropped, {reason.replace('_', ' ')}: {count:,}" for reason, count in result["dropped"].items()]
    if result["kept"]:
        files = Path(output, DATA) if "://" not in output else f"{output}/{DATA}"
        lines.append(f"  next: teacher-dump run, with data: {{files: [{files}], form: tokens, source_field: source}}")
    return lines
