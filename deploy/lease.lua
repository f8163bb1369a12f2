-- Give the training lease a new life (0 ends it), where it is still held under this token.
--
-- KEYS[1]  train:lease  string  "<token> <holder>"
-- ARGV[1]  that string as this worker wrote it
-- ARGV[2]  milliseconds to live from now
--
-- Returns 1 where it was held, 0 where it has run out or another worker holds it.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
