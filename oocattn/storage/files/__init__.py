"""Files and folders of any file system: read with a bound, written whole and durably, removed only if ours."""
