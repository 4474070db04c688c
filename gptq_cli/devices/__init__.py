"""The devices of this machine: how much memory they have, how it is flushed, how modules visit them."""
