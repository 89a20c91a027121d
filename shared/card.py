"""The dataset card: what a stranger reads first, and the YAML that makes `datasets.load_dataset` work."""

from shared.manifest import Manifest


def dataset_card(manifest: Manifest) -> str:
    teacher, keep = manifest.teacher, manifest.keep
    positions = max(manifest.total("positions"), 1)
    tails = _tails(manifest)
    loss = manifest.loss_nats[0] if manifest.shards else 0.0
    files = [file for each in manifest.inputs for file in each.files]
    sources = "\n".join(f"- `{file.name}`, sha256 `{file.sha256}`" for file in files)
    return f"""---
configs:
- config_name: default
  data_files: data/*.parquet
tags:
- knowledge-distillation
- logits
---
# Log-probabilities of {teacher.name}

Made by {manifest.created_by}, format version {manifest.format_version}.  One row is one sequence; for every
supervised token it holds what the teacher `{teacher.name}` ({teacher.architecture}) predicted there.

| | |
|---|---|
| rows | {manifest.total("rows"):,} |
| tokens | {manifest.total("tokens"):,} |
| positions (supervised tokens) | {manifest.total("positions"):,} |
| kept ids per position | {manifest.total("kept") / positions:.2f} ({", ".join(f"{k} {v}" for k, v in keep.items())}) |
| kept probability mass | {manifest.total("kept_mass") / positions:.4%} |
| mass of the rest | {tails} |
| lost by rounding | {loss:.2g} nats per position |
| vocabulary | {manifest.vocab_size:,} |

Made from:
{sources}

`logit-shards verify` checks every byte; `manifest.json` holds all digests.
"""


def _tails(manifest: Manifest) -> str:
    if not manifest.row_format.has_tails:
        return "none: ids are sampled, with weights"
    if manifest.tail_is_unknown:
        return "not known: imported lists had been renormalised; train with `loss.tail: renormalise`"
    if manifest.is_imported:
        return "1 − what is kept: imported, see `inputs` in the manifest"
    return f"exact, at T = {', '.join(f'{t:g}' for t in manifest.temperatures)}"
