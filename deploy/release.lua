-- Change the release where nobody changed it since it was read, and log the attempt either way.
--
-- KEYS[1]  rel:state  hash    the release
-- KEYS[2]  rel:log    stream  every attempt
-- ARGV[1]  the generation the change was made from
-- ARGV[2]  the new release, a JSON array: field, value, field, value, ...
-- ARGV[3]  the attempt, likewise
-- ARGV[4]  the channel on which an accepted change is announced
--
-- Returns 1 where the change was made, 0 where the release had moved on.

local generation = redis.call('HGET', KEYS[1], 'generation') or '0'
local accepted = generation == ARGV[1]
local attempt = cjson.decode(ARGV[3])
if accepted then
  local release = cjson.decode(ARGV[2])
  redis.call('HSET', KEYS[1], unpack(release))
  redis.call('XADD', KEYS[2], '*', 'outcome', 'accepted', unpack(attempt))
  redis.call('PUBLISH', ARGV[4], 'changed')
  return 1
end
redis.call('XADD', KEYS[2], '*', 'outcome', 'refused: generation is ' .. generation .. ' by now', unpack(attempt))
return 0
