# A package, since its files are named like those of other folders.
