"""Operations that are one pass over memory on a GPU."""
