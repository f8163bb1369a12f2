"""The pages as the browser gets them: HTML, CSS and ES modules of ours, as they are; ``page_routes`` serves them."""
