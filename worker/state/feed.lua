-- Sends a window of messages and moves the run's cursor: both or neither.
--
-- KEYS     the run, its feeder, the set of queues, the fingerprints of its messages, then the lists that the
--          run uses
-- ARGV     the feeder's token, the window's own token, jobs fed before and after it, the cursor after it,
--          the number of jobs in all or '' while it is not known, lines rejected so far, seconds that the
--          run's keys live, the first eight bytes of each message's fingerprint, the number of queues, the
--          queues, then for each job the number of its list, from 1, and its message; then for each job that
--          begins with the pictures of others its place among them, from 1, id, the job as JSON, queue, run mark,
--          and the ids of those others, separated by blanks
-- Returns  1: done, now or by an earlier try whose answer was lost; 0: somebody else has fed the run;
--          -1: somebody else is its feeder; -2: the run was cancelled
-- include notify.lua
-- include ../contract/put.lua
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return -1 end
if redis.call('HGET', KEYS[1], 'window') == ARGV[2] then return 1 end
if redis.call('HGET', KEYS[1], 'fed') ~= ARGV[3] then return 0 end
if redis.call('HGET', KEYS[1], 'cancelled') then return -2 end
local first = 11 + ARGV[10]
local behind = first + 2 * (ARGV[4] - ARGV[3])
local held, waiting = {}, 0
if behind <= #ARGV then
  -- include hold.lua
  for i = behind, #ARGV, 6 do
    local place, id, job, queue, mark, parents = unpack(ARGV, i, i + 5)
    local at = first + 2 * (place - 1)
    if hold(KEYS[4 + ARGV[at]], ARGV[at + 1], id, job, queue, mark, parents, ARGV[8]) then
      held[at] = true
      waiting = waiting + 1
    end
  end
end
for i = first, behind - 1, 2 do
  if not held[i] then put('LPUSH', KEYS[4 + ARGV[i]], ARGV[i + 1]) end
end
-- A field holds those of 512 jobs.
local prints, number = ARGV[9], tonumber(ARGV[3])
while prints ~= '' do
  local block, offset = math.floor(number / 512), number % 512
  local before = offset > 0 and redis.call('HGET', KEYS[4], block) or ''
  before = string.sub(before .. string.rep('\0', offset * 8), 1, offset * 8)
  redis.call('HSET', KEYS[4], block, before .. string.sub(prints, 1, (512 - offset) * 8))
  prints, number = string.sub(prints, (512 - offset) * 8 + 1), number + 512 - offset
end
redis.call('HSET', KEYS[1], 'window', ARGV[2], 'fed', ARGV[4], 'cursor', ARGV[5], 'rejected', ARGV[7])
if waiting > 0 then
  redis.call('HSET', KEYS[1], 'waiting', (redis.call('HGET', KEYS[1], 'waiting') or 0) + waiting)
end
if ARGV[6] ~= '' then redis.call('HSET', KEYS[1], 'total', ARGV[6]) end
for i = 5, #KEYS do redis.call('HSET', KEYS[1], 'list:' .. KEYS[i], 1) end
for i = 11, first - 1 do redis.call('SADD', KEYS[3], ARGV[i]) end
for _, part in ipairs({'', ':done', ':failed', ':cancelled', ':news'}) do redis.call('EXPIRE', KEYS[1] .. part, ARGV[8]) end
for i = 3, 4 do redis.call('EXPIRE', KEYS[i], ARGV[8]) end
if ARGV[6] ~= '' then
  local hook, ended, created = unpack(redis.call('HMGET', KEYS[1], 'webhook', 'ended', 'created'))
  -- Its last job ended before anybody knew that it is the last.
  if hook and tonumber(ended or 0) >= tonumber(ARGV[6]) then
    notify_run(TOLD_BY_PRODUCERS, KEYS[1], string.sub(KEYS[1], 1 + string.len('smallcat:run:')), hook, 'finished',
               created, ARGV[6], ARGV[7])
  end
end
return 1
