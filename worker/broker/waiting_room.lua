-- Who waits for messages in the same lists: a room. Two watch the lists, by CLIENT TRACKING, so that they hear
-- of a message whoever pushes it, and of whichever of them dies the other one is left. The others stand in line.
-- A watcher that gets a message leaves, and the first in line is called, to look and to watch in its place.
-- So a push wakes two, however many wait; and many messages at once wake one after the other.
--
-- room     its key, with which these begin:
--            :1, :2   string  the watchers' channels; they expire, in case a watcher is killed
--            :line    zset    the channels of those in line, by since when
-- who      a channel that the connection of the one who waits is subscribed to
-- place    '1', '2' or 'line'; 'called': it stood in line, and was called; '': it does not wait
--
-- include ../contract/clock.lua
--
-- `leave` and `call_next` run after a message was popped: an error would lose it, so none of theirs is raised.

-- Whether the place, if it is a watcher's, has not expired and gone to another.
local function is_own(room, who, place)
  return (place == '1' or place == '2') and redis.pcall('GET', room .. ':' .. place) == who
end

local function leave(room, who, place)
  if place == 'line' then
    redis.pcall('ZREM', room .. ':line', who)
  elseif is_own(room, who, place) then
    redis.pcall('DEL', room .. ':' .. place)
  end
end

-- Calls the first in line whose connection is alive. One that may not be called looks by itself in a second.
local function call_next(room)
  repeat
    local who = redis.pcall('ZPOPMIN', room .. ':line')[1]
    local heard = who and redis.pcall('PUBLISH', who, room)
  until heard ~= 0
end

-- Whoever stands in line reads no key here: by CLIENT TRACKING it would hear of each change of that key, too.
-- Nor does it renew the line's expiry, which the watchers do.
--
-- Returns  the place
local function wait(room, who, place, place_ms)
  if is_own(room, who, place) and redis.call('PEXPIRE', room .. ':' .. place, place_ms) == 1 then
    redis.call('PEXPIRE', room .. ':line', 4 * place_ms)
    return place
  end
  for _, free in ipairs({'1', '2'}) do
    if redis.call('SET', room .. ':' .. free, who, 'NX', 'PX', place_ms) then
      leave(room, who, place == 'line' and place or '')
      return free
    end
  end
  -- Who has stood in line, and does no longer, was called and did not hear it: it is first.
  if redis.call('ZADD', room .. ':line', 'NX', place == 'line' and 0 or now(), who) == 1 then
    redis.call('PEXPIRE', room .. ':line', 4 * place_ms)
  end
  return 'line'
end
