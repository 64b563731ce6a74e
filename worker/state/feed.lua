-- Sends a window of messages and moves the run's cursor: both or neither.
--
-- KEYS     the run, its feeder, the set of queues, then the lists that the run uses
-- ARGV     the feeder's token, the window's own token, jobs fed before and after it, the cursor after it,
--          the number of jobs in all or '' while it is not known, lines rejected so far, seconds that the
--          run's keys live, the number of queues, the queues, then number of the list, from 1, and message
--          in turn
-- Returns  1: done, now or by an earlier try whose answer was lost; 0: somebody else has fed the run;
--          -1: somebody else is its feeder; -2: the run was cancelled
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return -1 end
if redis.call('HGET', KEYS[1], 'window') == ARGV[2] then return 1 end
if redis.call('HGET', KEYS[1], 'fed') ~= ARGV[3] then return 0 end
if redis.call('HGET', KEYS[1], 'cancelled') then return -2 end
local first = 10 + ARGV[9]
for i = first, #ARGV, 2 do redis.call('LPUSH', KEYS[3 + ARGV[i]], ARGV[i + 1]) end
redis.call('HSET', KEYS[1], 'window', ARGV[2], 'fed', ARGV[4], 'cursor', ARGV[5], 'rejected', ARGV[7])
if ARGV[6] ~= '' then redis.call('HSET', KEYS[1], 'total', ARGV[6]) end
for i = 4, #KEYS do redis.call('HSET', KEYS[1], 'list:' .. KEYS[i], 1) end
for i = 10, first - 1 do redis.call('SADD', KEYS[3], ARGV[i]) end
for _, name in ipairs({KEYS[1], KEYS[1] .. ':done', KEYS[1] .. ':failed', KEYS[1] .. ':news', KEYS[3]}) do
  redis.call('EXPIRE', name, ARGV[8])
end
return 1
