"""The report of a run: one page and one text, made from the files of its folder alone."""
