"""Several recipes and seeds as one piece of work, where what they share is done once."""
