"""A checkpoint of one engine taken over by another: read by names of parameters, put into what runs."""
