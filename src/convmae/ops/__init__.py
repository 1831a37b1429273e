"""Operations that torch does not have."""
