"""A model of the hardware: what the head, the losses and a whole step should take, said before it is measured."""
