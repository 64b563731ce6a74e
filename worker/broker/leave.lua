-- Leaves the rooms of those who wait for messages in the same lists, for somebody who consumes no longer.
--
-- KEYS     the rooms
-- ARGV     who waited, its place in each of them
-- Returns  1: an answer, which nothing would not be told from a notice
-- include waiting_room.lua
for i, room in ipairs(KEYS) do
  leave(room, ARGV[1], ARGV[i + 1])
  call_next(room)
end
return 1
