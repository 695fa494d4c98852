"""Convert a checkpoint to several files, in processes: CHECKPOINT TARGET."""

import sys

from small_convert import SMALL_FILES, converting

from tasks.config import ExportSettings

if __name__ == "__main__":
    converting(sys.argv[1], sys.argv[2], ExportSettings(max_shard_megabytes=SMALL_FILES))
