"""The only code that imports Ray: controller, policies, worker actors, jobs client."""
