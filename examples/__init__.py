"""Programs to try Bitplan with."""

from service.logs import hush_libraries

hush_libraries()
