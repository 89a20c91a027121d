"""Phase 2: train a student on a dataset that the teacher left behind, with cross-entropy beside sparse KL."""

import shared

if not hasattr(shared, "IS_LOGITFERRY"):
    raise ImportError(
        f"another package named 'shared' hides logitferry's own: {shared.__file__ or list(shared.__path__)} "
        f"won the import, and it is not the one installed beside {__file__}.\n"
        "  next: take that folder's parent off PYTHONPATH, or run from a folder that has no shared/ in it"
    )
