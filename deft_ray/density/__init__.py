"""The science: approximations, density loss, exact counts."""
