"""experiment.py, but for its pages: a run in a process of its own, for tests of something else.

python -m tests.without_pages --profile=tiny --out_dir=run_1
"""

import experiment
from tests import small_run
from variants.kit import ranks

if __name__ == "__main__":
    small_run.leave_out_pages()
    ranks.end(experiment.main())
