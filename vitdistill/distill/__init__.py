"""The step: a plan of what each network computes, frozen teachers, and the losses of one batch."""
