"""After it ran: what runs came to, whether it helped, and what it cost; one page of it."""
