"""What both phases of logitferry stand on: text to supervised tokens, the dataset on disk, errors, config.

`shared` knows nothing of `teacher_dump` or `student_train`, and those two know nothing of each other.
The dataset part (`shared.dataset` and what it imports) needs no torch: a data team verifies a dataset without it.
"""

__version__ = "0.1.0"

# `shared` is a common name.  The other packages look for this marker and refuse to run on a stranger's.
IS_LOGITFERRY = True
